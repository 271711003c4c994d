"""`resnet-dist serve`: answer HTTP requests with the classes of images."""

from functools import partial

from export.serve.run import ServeConfig, run_serve

Config = ServeConfig


def main(cfg: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    run_serve(cfg, say=partial(print, flush=True))
    return 0
