"""Image files to the network's input, with nothing but the standard library, numpy and Pillow.

This file is copied beside every exported model, so it imports nothing of resnet-dist; training and evaluation import
their decoding and their evaluation geometry from here, which is what makes a deployed prediction equal to theirs.
"""

import dataclasses
import io
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What may be decoded, decided by content and not by name. Leaving EPS, PDF and their like out is a security rule:
# Pillow hands those to external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
MAX_PIXELS = 64_000_000
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# A file that unpacks to hundreds of megapixels is an attack or an accident: never a warning that scrolls by.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used: unreadable, of a format or size that is not accepted. One line, no path."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image file becomes the network's input. Stored verbatim in checkpoints and exported models.

    The fixed rules, stated in the stored form too: EXIF orientation is applied, alpha is composited on white,
    16-bit grey is scaled, the resize is antialiased and done by Pillow on uint8, the long side of a `crop` resize is
    `int(resize * long / short)`, the crop starts at `round((size - img_size) / 2)` with halves to the even number.

    Attributes:
        img_size: side of the square result, pixels.
        resize_mode: "crop" (short side to `resize`, cut the centre), "squash" (ignore the aspect ratio) or
            "pad" (long side to `img_size`, filled up with `fill`).
        resize: short side before the crop, pixels; equals `img_size` in the other modes.
        interpolation: "bilinear" or "bicubic".
        mean, std: of the three channels, in 0..1.
        fill: colour of the padding, 0..255.
    """

    img_size: int = 224
    resize_mode: str = "crop"
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fill: tuple[int, int, int] = (124, 116, 104)

    RULES: ClassVar[Mapping[str, str]] = {
        "color": "RGB",
        "exif": "transpose",
        "alpha": "composite on white",
        "sixteen_bit": "divide by 257",
        "resize_library": "Pillow, uint8, antialias",
        "resize_rounding": "int(resize * long / short)",
        "crop_rounding": "round half to even",
        "scale": "1/255",
    }

    def to_dict(self) -> dict[str, Any]:
        """The spec and its fixed rules as plain JSON values."""
        fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {**fields, **self.RULES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The spec from its stored form.

        Raises ValueError where a key is missing or unknown, a rule is not the one that this code follows, or a value
        is out of range.
        """
        wrong = [
            f"{name}: {values.get(name)!r} is not {rule!r}"
            for name, rule in cls.RULES.items()
            if values.get(name) != rule
        ]
        names = {field.name for field in dataclasses.fields(cls)}
        wrong += [f"{name} is missing" for name in names - set(values)]
        wrong += [f"unknown {name}" for name in set(values) - names - set(cls.RULES)]
        if wrong:
            raise ValueError("preprocessing: " + "; ".join(sorted(wrong)))
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v := values[name], list) else v for name in names}
        spec = cls(**fields)
        spec._check()
        return spec

    def _check(self) -> None:
        sizes_fit = all(type(n) is int and 1 <= n <= 4096 for n in (self.img_size, self.resize))
        if not sizes_fit or (self.resize_mode == "crop" and self.resize < self.img_size):
            raise ValueError(f"preprocessing: img_size {self.img_size!r} and resize {self.resize!r} do not fit")
        if self.resize_mode not in ("crop", "squash", "pad") or self.interpolation not in FILTERS:
            raise ValueError(f"preprocessing: unknown {self.resize_mode!r} or {self.interpolation!r}")
        for name in ("mean", "std", "fill"):
            values = getattr(self, name)
            limit = 255 if name == "fill" else 1
            if len(values) != 3 or not all(isinstance(v, int | float) and 0 <= v <= limit for v in values):
                raise ValueError(f"preprocessing: {name} {values!r} is not three numbers in 0..{limit}")
        if min(self.std) <= 0:
            raise ValueError("preprocessing: std must be above 0")


def decode(source: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file, or its bytes, as an upright RGB image.

    Of an animation, the first frame. Raises ImageError for whatever cannot be used, before decoding where the header
    already says so. A file that cannot be opened at all raises OSError.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width}x{image.height} pixels, more than the limit of {max_pixels}")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(f"more pixels than the limit of {max_pixels}") from None
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a format that is read here ({', '.join(FORMATS)})") from None
    except ImageError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        # What Pillow's decoders raise on damaged files; the first argument is a reason in words.
        raise ImageError(f"damaged or truncated ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: alpha composited on white, 16 bits scaled to 8. Raises ImageError for float data."""
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    if image.mode.startswith("I"):
        return _scaled_16_bit(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range is not known: convert it to 8 bits first")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError("32-bit pixels, whose range is not known: convert it to 8 bits first")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8), "L").convert("RGB")


def fit(image: Image.Image, spec: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The evaluation geometry: an RGB image as a uint8 array of (img_size, img_size, 3).

    Raises ImageError where the aspect ratio is so extreme that the resized image would exceed `max_pixels`.
    """
    size, filter_ = spec.img_size, FILTERS[spec.interpolation]
    if spec.resize_mode == "squash":
        return np.asarray(image.resize((size, size), filter_))
    width, height = image.size
    if spec.resize_mode == "pad":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", (size, size), spec.fill)
        canvas.paste(image.resize(inner, filter_), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return np.asarray(canvas)
    short, long = sorted((width, height))
    if short != spec.resize:
        longer = int(spec.resize * long / short)
        if longer * spec.resize > max_pixels:
            raise ImageError(f"{width}x{height} pixels: so narrow that resizing it would exceed the pixel limit")
        image = image.resize((spec.resize, longer) if width <= height else (longer, spec.resize), filter_)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalise(pixels: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """uint8 of (..., 3) to float32: (x / 255 - mean) / std, through a table of the 256 values of each channel."""
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (levels - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.stack([table[pixels[..., channel], channel] for channel in range(3)], axis=-1)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
