"""How fast `resnet-dist check` looks at images: headers only (as every `train` does) and whole, on one core and on all.

    python benchmarks/check.py hymenoptera cats_dogs fruits cifar10 --json check.json

Every DATA is a folder or a manifest. Each number is the best of `--rounds` rounds over all its images, after one round
that is not timed and brings the files into the page cache; the cache of findings is not used. One core is the
scheduling affinity of this process, so the pool of threads is as on a machine with one core.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_dist.config.schema import DataConfig
from resnet_dist.data.check import look_at_all, report_on
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.runtime.machine import made_with


def seconds(index: ImageIndex, full: bool, rounds: int) -> float:
    """Of the fastest round over all images of the index."""
    look_at_all(index, full)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        look_at_all(index, full)
        times.append(time.perf_counter() - started)
    return min(times)


def measured(data: str, rounds: int) -> dict[str, Any]:
    """Images, bytes and speeds of one data set, plain JSON values."""
    index = read_index(DataConfig(data=data))
    paths = [index.root / path for split in ("train", "val", "test") for path in index.part(split).paths]
    facts: dict[str, Any] = {"images": len(paths), "mib": round(sum(p.stat().st_size for p in paths) / 2**20, 1)}
    everywhere = os.sched_getaffinity(0)
    for cores, name in (({min(everywhere)}, "one_core"), (everywhere, "all_cores")):
        os.sched_setaffinity(0, cores)
        for full, what in ((False, "headers"), (True, "full")):
            speed = len(paths) / seconds(index, full, rounds)
            facts[f"{what}_{name}_images_per_second"] = round(speed)
            facts[f"{what}_{name}_images_per_second_and_core"] = round(speed / len(cores))
    started = time.perf_counter()
    report_on(look_at_all(index, full=True))
    facts["whole_check_with_duplicates_seconds"] = round(time.perf_counter() - started, 2)
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a markdown table, write the JSON file."""
    parser = argparse.ArgumentParser(description="Speed of resnet-dist check.", allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="DATA", help="folders or manifests")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds, the fastest counts (3)")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    results = {Path(data).name: measured(data, options.rounds) for data in options.data}
    print("| data | images | headers, images/s on one core | full, on one core | full, on all cores, per core |")
    print("|---|---|---|---|---|")
    for name, facts in results.items():
        speeds = [facts[f"{kind}_images_per_second_and_core"] for kind in ("headers_one_core", "full_one_core")]
        speeds.append(facts["full_all_cores_images_per_second_and_core"])
        print(f"| {name} | {facts['images']} | {' | '.join(map(str, speeds))} |")
    if options.json:
        about = {"rounds": options.rounds, **made_with()}
        Path(options.json).write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
