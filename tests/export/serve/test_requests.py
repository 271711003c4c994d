"""What the server answers: to images as `predict` does, to anything else with one line."""

import base64
import http.client
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from export.predict import main
from tests.export.serve.servers import BOUNDARY, Server, form, get, send


@pytest.fixture(scope="module")
def expected(model: Path, photos: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The lines of `predict --format jsonl`."""
    file = tmp_path_factory.mktemp("expected") / "lines.jsonl"
    assert main([str(model), *map(str, photos), "--format", "jsonl", "-o", str(file)]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/JPEG; q=1", "application/octet-stream"])
def test_one_image_is_answered_as_predict_does(
    client: http.client.HTTPConnection, photos: Sequence[Path], expected: Sequence[Any], kind: str
) -> None:
    for photo, line in zip(photos, expected, strict=True):
        answer = send(client, kind, photo.read_bytes())
        assert answer.status == 200
        assert answer.json == {**line, "path": "image"}


def test_files_of_a_form_are_answered_in_order(
    client: http.client.HTTPConnection, photos: Sequence[Path], expected: Sequence[Any]
) -> None:
    names = ["a.png", "../../etc/passwd", "ü.png", "a.png", "<b>", "x" * 2000]
    answer = send(client, *form([(name, photo.read_bytes()) for name, photo in zip(names, photos, strict=True)]))
    assert answer.status == 200
    assert answer.json == [{**line, "path": name} for line, name in zip(expected, names, strict=True)]


def test_a_bad_image_does_not_spoil_the_others(
    client: http.client.HTTPConnection, photos: Sequence[Path], expected: Sequence[Any]
) -> None:
    good = [base64.b64encode(photo.read_bytes()).decode() for photo in photos]
    bad = [base64.b64encode(b"no image").decode(), "no base64", "", "é"]
    answer = send(client, "application/json", json.dumps([good[0], *bad, good[1]]).encode())
    assert answer.status == 200
    first, *errors, last = answer.json
    assert [first["predictions"], last["predictions"]] == [line["predictions"] for line in expected[:2]]
    assert [line["error"] for line in errors[1:4:2]] == ["not base64 (without line breaks)"] * 2
    assert all(line["error"] and line["predictions"] == [] for line in errors)


def test_number_of_classes(client: http.client.HTTPConnection, photos: Sequence[Path]) -> None:
    for wanted, given in (("1", 1), ("2", 2), ("7", 3)):
        answer = send(client, "image/png", photos[0].read_bytes(), f"/predict?top_k={wanted}")
        assert len(answer.json["predictions"]) == given
    for wrong in ("0", "-1", "x", "1.5", "", "9" * 5000, "²"):
        answer = send(client, "image/png", photos[0].read_bytes(), f"/predict?top_k={wrong.replace('²', '%C2%B2')}")
        assert answer.status == 400 and "top_k" in answer.json["error"]


def huge() -> bytes:
    """An image of more pixels than this server takes, in a few bytes."""
    file = io.BytesIO()
    Image.new("1", (1001, 1000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("image/png", b"", 422, "not an image in a supported format"),
        ("image/png", huge(), 422, "1001x1000 pixels, more than the limit of 1000000"),
        ("image/png", b"x" * 600_000, 413, "the body is larger than 524288 bytes"),
        ("text/plain", b"x", 415, "Content-Type text/plain: send an image"),
        ("", b"x", 415, "Content-Type (none): send an image"),
        ("application/x-www-form-urlencoded", b"x", 415, "send an image"),
        ("application/json", b"[", 400, "not JSON"),
        ("application/json", b"[" * 100_000, 400, "not JSON"),
        ("application/json", b"\xff", 400, "not JSON"),
        ("application/json", b'{"image": "x"}', 400, "not a list of base64 texts"),
        ("application/json", b"[1]", 400, "not a list of base64 texts"),
        ("application/json", b"[]", 400, "no image in the request"),
        ("application/json", json.dumps(["x"] * 129).encode(), 413, "129 images, more than the limit of 128"),
        ("application/json", b'["x"]', 422, "not base64"),
        ("multipart/form-data", b"x", 400, "not a form"),
        (form([])[0], b"x", 400, "not a form"),
        (form([])[0], f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\n".encode(), 400, "not a form"),
        (form([])[0], form([("x", b"x")])[1].replace(b"; filename", b"; other"), 400, "field 'image' is not a file"),
        (*form([]), 400, "no image in the request"),
        (*form([("x", b"x")] * 129), 413, "more than 128 images"),
        (f"multipart/form-data; charset=undefined; boundary={BOUNDARY}", form([("x", b"x")])[1], 400, "charset"),
    ],
)
def test_refusals_are_one_line(
    client: http.client.HTTPConnection, kind: str, body: bytes, status: int, words: str
) -> None:
    answer = send(client, kind, body)
    said = answer.json if isinstance(answer.json, dict) else answer.json[0]
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert words in said["error"] and "\n" not in said["error"]


def test_a_body_that_hides_its_size_is_refused(client: http.client.HTTPConnection) -> None:
    client.request("POST", "/predict", iter([b"x" * 100_000] * 6), {"Content-Type": "image/png"}, encode_chunked=True)
    assert client.getresponse().status == 413


def test_a_compressed_body_is_refused(client: http.client.HTTPConnection) -> None:
    answer = send(client, "image/png", b"x", **{"Content-Encoding": "gzip"})
    assert answer.status == 415 and "Content-Encoding" in answer.json["error"]


def test_other_addresses_and_methods(client: http.client.HTTPConnection) -> None:
    for method, path, status in (("GET", "/predict", 405), ("POST", "/", 405), ("GET", "/../etc/passwd", 404)):
        client.request(method, path)
        response = client.getresponse()
        assert response.status == status and list(json.loads(response.read())) == ["error"]


def test_no_header_invites_other_sites(client: http.client.HTTPConnection, photos: Sequence[Path]) -> None:
    answer = send(client, "image/png", photos[0].read_bytes(), Origin="https://example.com")
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "server"]


def photograph(kind: str = "JPEG") -> bytes:
    """An image with an Exif orientation and a resolution, of which a damaged one makes Pillow warn."""
    file, exif = io.BytesIO(), Image.Exif()
    exif.update({0x0112: 6, 0x0131: "a camera", 0x8298: "somebody"})
    Image.new("RGB", (60, 40), "teal").save(file, kind, exif=exif, dpi=(72, 72))
    return file.getvalue()


def test_a_thousand_malformed_bodies(
    server: Server, client: http.client.HTTPConnection, photos: Sequence[Path], expected: Sequence[Any]
) -> None:
    """Each gets an answer in JSON, and the server goes on."""
    chance = random.Random(0)
    photo = photos[0].read_bytes()
    bodies = [("image/png", photo), form([("a.png", photo), ("b.png", photo)])]
    bodies += [("image/jpeg", photograph()), ("image/tiff", photograph("TIFF"))]
    bodies.append(("application/json", json.dumps([base64.b64encode(photo).decode()] * 2).encode()))
    statuses = set()
    for number in range(1000):
        kind, body = bodies[number % 5]
        damaged = bytearray(body[: chance.randrange(len(body))] if number % 2 else body)
        for _ in range(chance.randrange(1, 9)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        answer = send(client, kind, bytes(damaged))
        assert answer.json
        statuses.add(answer.status)
    assert {400, 422} <= statuses <= {200, 400, 422}
    assert send(client, "image/png", photo).json["predictions"] == expected[0]["predictions"]


def test_a_client_that_leaves_is_no_error(server: Server, client: http.client.HTTPConnection) -> None:
    """The fixture of the server asserts that its log is empty."""
    leaving = server.connect()
    leaving.putrequest("POST", "/predict")
    leaving.putheader("Content-Type", "image/png")
    leaving.putheader("Content-Length", "1000")
    leaving.endheaders(b"x")
    leaving.close()
    assert get(client, "/health").json == {"status": "ok"}


def test_health_readiness_and_metrics(client: http.client.HTTPConnection, photos: Sequence[Path]) -> None:
    assert get(client, "/health").status == get(client, "/ready").status == 200

    def values() -> dict[str, float]:
        """By name and labels, as Prometheus' own parser reads them."""
        families = text_string_to_metric_families(get(client, "/metrics").body.decode())
        return {f"{s.name}{sorted(s.labels.items())}": s.value for family in families for s in family.samples}

    before = values()
    send(client, *form([("a", photos[0].read_bytes()), ("b", b"x"), ("c", photos[1].read_bytes())]))
    send(client, "image/png", b"x")
    change = {name: value - before.get(name, 0) for name, value in values().items()}
    assert change["resnet_dist_images_total[('result', 'classified')]"] == 2
    assert change["resnet_dist_images_total[('result', 'unusable')]"] == 2
    assert change["resnet_dist_requests_total[('status', '200')]"] == 1
    assert change["resnet_dist_requests_total[('status', '422')]"] == 1
    assert change["resnet_dist_request_seconds_count[]"] == 2
    assert change["resnet_dist_request_seconds_bucket[('le', '+Inf')]"] == 2
    assert change["resnet_dist_batch_images_sum[]"] == 2
    assert before["resnet_dist_images_in_work[]"] == 0 and before["resnet_dist_ready[]"] == 1


def test_the_description_is_valid_and_describes_the_answers(
    client: http.client.HTTPConnection, photos: Sequence[Path]
) -> None:
    document = get(client, "/openapi.json").json
    validate(document)
    responses = document["paths"]["/predict"]["post"]["responses"]
    photo = photos[0].read_bytes()
    requests = [("image/png", photo), form([("a", photo), ("b", b"x")]), ("image/png", b"x"), ("x/y", b"")]
    for kind, body in requests:
        answer = send(client, kind, body)
        schema = responses[str(answer.status)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json, {**schema, "components": document["components"]})
