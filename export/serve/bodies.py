"""Read the images out of a request, within limits."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

MAX_HELD = 1 << 28  # bytes of all bodies that are in memory
SECONDS_TO_READ = 30.0
KINDS = "send an image (Content-Type: image/jpeg), files (multipart/form-data) or a JSON list of base64 texts"
RETRY = {"Retry-After": "1"}

Named = tuple[str, bytes | str]  # a name for the answer, and the bytes of an image or base64 text


class InMemory(MultiPartParser):
    """Keeps the files in memory: their size is bounded already, and there may be no disk to write to."""

    spool_max_size = 0  # no limit


class Load:
    """What the requests in work occupy: places for images, and bytes of their bodies."""

    def __init__(self, places: int) -> None:
        self.places, self.images, self.bytes = places, 0, 0

    def take(self, images: int, size: int) -> None:
        """Occupy places and bytes. Raises HTTPException 503 if there are not enough; then it occupies nothing."""
        if self.images + images > self.places or (self.bytes and self.bytes + size > MAX_HELD):
            raise HTTPException(503, "the server is busy: try again later", RETRY)
        self.images += images
        self.bytes += size


class Intake:
    """The share of one request in the load, a context that gives it back."""

    def __init__(self, load: Load) -> None:
        self._load, self._images, self._bytes = load, 0, 0

    def take(self, images: int = 0, size: int = 0) -> None:
        """Occupy more. Raises HTTPException 503."""
        self._load.take(images, size)
        self._images += images
        self._bytes += size

    def __enter__(self) -> "Intake":
        return self

    def __exit__(self, *_: object) -> None:
        self._load.images -= self._images
        self._load.bytes -= self._bytes


async def images_of(request: Request, intake: Intake, limit: int, most: int) -> tuple[list[Named], bool]:
    """The images of a request, and whether it sent several: then a list is the answer.

    `limit`: of the body, in bytes; `most`: of images. Raises HTTPException 400, 408, 413, 415 or 503.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_image = kind.startswith("image/") or kind == "application/octet-stream"
    if not is_image and kind not in ("multipart/form-data", "application/json"):
        raise HTTPException(415, f"Content-Type {kind or '(none)'}: {KINDS}")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Content-Encoding: send the body as it is")
    intake.take(images=1)
    body = await read_body(request, intake, limit)
    if is_image:
        return [("image", body)], False
    images = await (files_of(request, body, most) if kind == "multipart/form-data" else listed_in(body))
    if not images:
        raise HTTPException(400, f"no image in the request: {KINDS}")
    if len(images) > most:
        raise HTTPException(413, f"{len(images)} images, more than the limit of {most}: send them in several requests")
    intake.take(images=len(images) - 1)
    return images, True


async def read_body(request: Request, intake: Intake, limit: int) -> bytes:
    """The body of a request. Raises HTTPException 408 (too slow), 413 (too large) or 503 (too much in memory)."""
    too_large = HTTPException(413, f"the body is larger than {limit} bytes")
    if request.headers.get("content-length", "0").isdigit() and int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS_TO_READ):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                intake.take(size=len(part))
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {SECONDS_TO_READ:g} seconds") from None
    return b"".join(parts)


async def files_of(request: Request, body: bytes, most: int) -> list[Named]:
    """The files of a form, by their names. Raises HTTPException 400, or 413 for more files than `most`."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await InMemory(request.headers, stream(), max_files=most).parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise HTTPException(413, f"more than {most} images: send them in several requests") from None
        raise HTTPException(400, f"not a form: {error.message}") from None
    except UnicodeError:  # of a charset that Python cannot decode or encode
        raise HTTPException(400, "not a form: its charset cannot be used") from None
    images: list[Named] = []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise HTTPException(400, f"field {name!r} is not a file")
        images.append((value.filename or "image", await value.read()))
    await form.close()
    return images


async def listed_in(body: bytes) -> list[Named]:
    """The texts of a JSON list. Raises HTTPException 400."""
    try:
        texts: Any = await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise HTTPException(400, "the JSON is not a list of base64 texts")
    return [("image", text) for text in texts]


def bytes_of(image: bytes | str) -> bytes | None:
    """The bytes of an image, or None if a text is not base64."""
    try:
        return image if isinstance(image, bytes) else base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return None
