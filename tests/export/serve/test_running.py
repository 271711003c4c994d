"""How the server starts, refuses to start, is busy, and stops."""

import http.client
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from export import predict
from export.serve import run
from tests.export.serve.servers import Server, answer, form, get, send, serving

Refused = Callable[..., str]


def begin(server: Server, length: int, first: bytes) -> http.client.HTTPConnection:
    """A request whose body is not complete."""
    connection = server.connect()
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(length))
    connection.endheaders(first)
    return connection


def test_a_busy_server_says_when_to_try_again(model: Path, photos: Sequence[Path]) -> None:
    photo = photos[0].read_bytes()
    with serving(model, "--queue", "2") as server:
        first = begin(server, len(photo), photo[:9])
        other = server.connect()
        while b"in_work 1" not in get(other, "/metrics").body:
            time.sleep(0.01)
        assert send(other, "image/png", photo).status == 200
        busy = send(other, *form([("a", photo), ("b", photo)]))
        assert (busy.status, busy.headers["retry-after"]) == (503, "1")
        assert busy.json == {"error": "the server is busy: try again later"}
        first.send(photo[9:])
        assert answer(first).status == 200
        assert send(other, *form([("a", photo), ("b", photo)])).status == 200, "the places are free again"
        first.close()
        other.close()


def test_no_request_is_lost_when_the_server_is_told_to_stop(model: Path, photos: Sequence[Path]) -> None:
    """Eight clients send one request after the other; each that was sent is answered, up to the last."""
    photo = photos[0].read_bytes()
    statuses: list[int] = []
    unanswered: list[str] = []

    def client(server: Server) -> None:
        connection = server.connect()
        connection.connect()
        while True:
            try:
                reply = send(connection, "image/png", photo)
            except OSError as error:
                unanswered.append(repr(error))
                return
            statuses.append(reply.status)
            if reply.headers.get("connection") == "close":
                connection.close()
                return

    with serving(model) as server:
        slow = begin(server, len(photo), photo[:9])
        clients = [threading.Thread(target=client, args=(server,)) for _ in range(8)]
        for one in clients:
            one.start()
        while len(statuses) < 100:
            time.sleep(0.01)
        server.process.terminate()
        for one in clients:
            one.join(30)
        slow.send(photo[9:])
        assert answer(slow).status == 200, "a request that had begun is answered"
        slow.close()
        assert server.process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            server.connect().connect()
    assert unanswered == [] and set(statuses) == {200}


def test_a_signal_right_after_the_start_is_obeyed(model: Path) -> None:
    with serving(model) as server:
        assert server.stop() == 0


def test_an_address_in_use_is_one_line(model: Path, refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(4, "serve", model, "--port", port)
    assert said == (
        f"resnet-dist serve: error: --host 127.0.0.1 --port {port}: cannot listen there (Address already in use)\n"
    )
    assert "cannot listen there" in refused(4, "serve", model, "--port", 0, "--host", "192.0.2.1")
    assert "cannot listen there" in refused(4, "serve", model, "--port", 0, "--host", "no.such.host.invalid")


def test_a_model_that_cannot_be_used_is_one_line(tmp_path: Path, model: Path, refused: Refused) -> None:
    assert "there is no model.onnx in it" in refused(6, "serve", tmp_path, "--port", 0)
    (tmp_path / "model.onnx").write_bytes(model.read_bytes().replace(b"GlobalAveragePool", b"GlobalAveragePoll"))
    assert "damaged or changed" in refused(6, "serve", tmp_path, "--port", 0)


def test_options_out_of_range(refused: Refused) -> None:
    wrong = {"--port": "65536", "--queue": "0", "--max-batch": "0", "--max-wait": "-1", "--max-mib": "0"}
    said = refused(2, "serve", *(word for pair in wrong.items() for word in pair))
    assert "MODEL is missing" in said
    assert all(f"{name} {value}: must be" in said for name, value in wrong.items())


def test_limits_are_those_of_the_predictor() -> None:
    assert (run.MAX_PIXELS, run.MAX_MIB << 20) == (predict.MAX_PIXELS, predict.MAX_FILE_BYTES)


def test_a_missing_package_is_named(model: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "export.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused(2, "serve", model) == (
        "resnet-dist serve: error: serve needs uvicorn: pip install 'resnet-dist[serve]'\n"
    )


def test_a_batch_without_memory_is_one_line(model: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(predictor: predict.Predictor, batch: int) -> None:
        raise MemoryError

    monkeypatch.setattr("export.serve.server.warm_up", too_large)
    assert "--max-batch 9: not enough memory for such a batch" in refused(
        4, "serve", model, "--port", 0, "--max-batch", 9
    )
