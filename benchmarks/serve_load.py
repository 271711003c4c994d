"""`resnet-dist serve` under load, beside a plain loop of the same model, Pillow and onnxruntime.

    python benchmarks/serve_load.py MODEL IMAGES --json serve_load.json

MODEL is an exported run, IMAGES a folder of JPEG files. Everything runs on this machine: servers and clients share its
cores. A client sends one image after the other on one connection, each as soon as the last is answered. The servers run
in turns, `--rounds` times. Then come, for `serve` alone, a long round with the most clients, 1,000 damaged images from
eight clients beside eight others, and SIGTERM under the most clients.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from resnet_dist.runtime.machine import made_with

KINDS = ("serve", "loop", "threads")
MEDIANS = ("per_second", "p50_ms", "p99_ms", "cpu_ms")  # cpu_ms: of the server, per answer


@dataclass
class Result:
    """What the clients of a round saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        hundredths = statistics.quantiles(self.latencies, n=100)
        return {
            "per_second": round(self.statuses["200"] / self.seconds, 2),
            "p50_ms": round(1000 * hundredths[49], 1),
            "p99_ms": round(1000 * hundredths[98], 1),
            "answers": dict(self.statuses),
        }


async def client(port: int, images: Sequence[bytes], until: float, result: Result) -> None:
    """Send images until then, or until the server ends the connection with an answer; one without is `unanswered`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    status, ends = "", False
    for image in images:
        if ends or time.perf_counter() >= until:
            break
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
        started = time.perf_counter()
        try:
            writer.write(head.encode() + image)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(re.findall(r"content-length: (\d+)", answer)[0]))
            status, ends = answer.split()[1], "connection: close" in answer
        except (OSError, asyncio.IncompleteReadError):
            status, ends = "unanswered", True
        result.statuses[status] += 1
        result.latencies.append(time.perf_counter() - started)
    writer.close()


async def load(port: int, images: Sequence[bytes], clients: int, seconds: float) -> Result:
    """A round of so many clients, each with another order of the images."""
    result, started = Result(), time.perf_counter()
    orders = [random.Random(number).choices(images, k=100_000) for number in range(clients)]
    await asyncio.gather(*(client(port, order, started + seconds, result) for order in orders))
    result.seconds = time.perf_counter() - started
    return result


@asynccontextmanager
async def server(kind: str, options: argparse.Namespace) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A server in a process of its own, and its port."""
    threads = str(options.threads)
    ours = ["-m", "resnet_dist", "serve", options.model, "--port", "0", "--threads", threads]
    plain = [str(Path(__file__).with_name("serve_plain.py")), options.model, kind, threads]
    command = [sys.executable, *(ours if kind == "serve" else plain)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    port = int(re.findall(rb":(\d+)$", (await process.stdout.readline()).strip())[0])
    try:
        yield process, port
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def cpu_seconds(process: asyncio.subprocess.Process) -> float:
    """CPU time of a server so far."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


async def compared(options: argparse.Namespace, images: Sequence[bytes]) -> dict[str, dict[str, Any]]:
    """All servers in turns, by number of clients: the medians of the rounds, and the throughput of each round."""
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for kind in KINDS:
            async with server(kind, options) as (process, port):
                await load(port, images, 2, 1)
                for clients in options.clients:
                    before = cpu_seconds(process)
                    facts = (await load(port, images, clients, options.seconds)).facts()
                    answers = sum(facts["answers"].values())
                    facts["cpu_ms"] = 1000 * (cpu_seconds(process) - before) / answers
                    rounds.setdefault((kind, clients), []).append(facts)
    found: dict[str, dict[str, Any]] = {}
    for (kind, clients), several in rounds.items():
        medians = {name: round(statistics.median(r[name] for r in several), 1) for name in MEDIANS}
        answers = sum((Counter(one["answers"]) for one in several), Counter[str]())
        every = {"per_second_of_rounds": [one["per_second"] for one in several], "answers": dict(answers)}
        found.setdefault(str(clients), {})[kind] = {**medians, **every}
    return found


def damaged(images: Sequence[bytes], count: int, seed: int) -> list[bytes]:
    """Images cut off, with other bytes, or both."""
    chance, made = random.Random(seed), []
    for number in range(count):
        image = bytearray(chance.choice(images))
        if number % 2:
            del image[chance.randrange(len(image)) :]
        for _ in range(100):
            if image:
                image[chance.randrange(len(image))] = chance.randrange(256)
        made.append(bytes(image))
    return made


async def faults(options: argparse.Namespace, images: Sequence[bytes]) -> dict[str, Any]:
    """A long round, damaged images between good ones, and SIGTERM under load."""
    most, far = max(options.clients), time.perf_counter() + 600
    async with server("serve", options) as (process, port):
        long = await load(port, images, most, options.long_seconds)
        bad = Result()
        parts = [damaged(images, 125, seed) for seed in range(8)]
        sending = asyncio.gather(*(client(port, part, far, bad) for part in parts))
        good = [await load(port, images, 8, 2)]
        while not sending.done():
            good.append(await load(port, images, 8, 2))
        stopping = asyncio.create_task(load(port, images, most, 60))
        await asyncio.sleep(3)
        process.send_signal(signal.SIGTERM)
        stopped, code = await stopping, await process.wait()
    others = sum((result.statuses for result in good), Counter[str]())
    return {
        "long_round": {"clients": most, "seconds": options.long_seconds, **long.facts()},
        "damaged": {"answers": dict(bad.statuses), "answers_of_others": dict(others)},
        "sigterm": {"answers": dict(stopped.statuses), "exit_code": code},
    }


def main() -> None:
    """Measure, print a markdown table, write the JSON file."""
    parser = argparse.ArgumentParser(description="The server under load.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="an exported run folder or a .onnx file")
    parser.add_argument("images", metavar="IMAGES", help="a folder of JPEG files")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="(1 8 64)")
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="of a round (10)")
    parser.add_argument("--long-seconds", type=float, default=60, metavar="S", help="of the long round (60)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all servers in turns (3)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of every server (2)")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args()
    images = [file.read_bytes() for file in sorted(Path(options.images).rglob("*.jpg"))]
    results = {"servers": asyncio.run(compared(options, images)), **asyncio.run(faults(options, images))}
    print("| clients | server | requests/s | p50, ms | p99, ms | CPU ms per answer |\n|---|---|---|---|---|---|")
    for clients, servers in results["servers"].items():
        for kind, one in servers.items():
            print(f"| {clients} | {kind} | {' | '.join(str(one[name]) for name in MEDIANS)} |")
    for name in ("long_round", "damaged", "sigterm"):
        print(f"{name}: {json.dumps(results[name])}")
    if options.json:
        about = {name: getattr(options, name) for name in ("seconds", "rounds", "threads")}
        Path(options.json).write_text(json.dumps({**about, **made_with(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
