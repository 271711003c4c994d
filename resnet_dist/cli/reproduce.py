"""`resnet-dist reproduce`: repeat a run from what its folder says, and report what differs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config.fields import option, out_of_range, required


@dataclass(frozen=True, kw_only=True)
class Config:
    """Repeat a run from its config.toml on the same data; compare the metrics and the bytes of the best checkpoint.

    On the same CPU, versions and threads the bytes are the same. The exit code is 0 if top-1, top-5 and macro-F1 are
    within --tolerance, whether the bytes are the same or not, else 6.
    """

    run: str | None = option(None, positional=True)
    """A run folder whose training is done."""
    output_dir: str | None = option(None, "-o", "--output")
    """The folder of the new run (default: RUN-again); the same command resumes an interrupted one."""
    tolerance: float = 0.01
    """The largest accepted difference of top-1, top-5 and macro-F1 (each 0..1)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"
        yield from out_of_range(self, 0, 1, "tolerance")


def main(cfg: Config) -> int:
    """Train again, compare, print, and write reproduction.json. Returns the exit code."""
    from resnet_dist.training.reproduce import reproduce

    old = Path(required(cfg.run, "RUN"))
    new = Path(cfg.output_dir) if cfg.output_dir is not None else old.with_name(f"{old.name}-again")
    reproduce(old, new, cfg.tolerance)
    return 0
