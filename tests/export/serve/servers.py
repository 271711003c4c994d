"""A server in a process of its own, and requests to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUNDARY = "a-boundary"


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def stop(self) -> int:
        """Tell it to stop. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def running(command: Sequence[str], **settings: Any) -> Iterator[Server]:
    """The server that a command starts, which ends with the block; its log must be empty then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = re.search(r" on http://127\.0\.0\.1:(\d+)$", line.strip())
        assert match, line + process.communicate(timeout=10)[1]
        yield Server(process, int(match[1]))
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert log == "", log


def serving(model: Path, *options: str) -> AbstractContextManager[Server]:
    """A server of the program."""
    command = [sys.executable, "-m", "resnet_dist", "serve", str(model), "--port", "0", "--threads", "1", *options]
    return running(command, env={**os.environ, "PYTHONUTF8": "1"})


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    connection: http.client.HTTPConnection, kind: str, body: bytes, path: str = "/predict", **headers: str
) -> Answer:
    """POST a body of this Content-Type."""
    connection.request("POST", path, body, {"Content-Type": kind, **headers})
    return answer(connection)


def get(connection: http.client.HTTPConnection, path: str) -> Answer:
    connection.request("GET", path)
    return answer(connection)


def answer(connection: http.client.HTTPConnection) -> Answer:
    """The next answer on a connection."""
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def form(files: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    """The Content-Type and the body of a form with these files."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return f"multipart/form-data; boundary={BOUNDARY}", b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
