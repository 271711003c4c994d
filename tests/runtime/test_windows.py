"""What Windows lacks is taken away from Python: help and reading still work, and training refuses in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.cli.main import VERBS

WITHOUT = """
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it raises ImportError
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
for name in ("lockf", "memfd_create", "pwrite", "O_NOFOLLOW", "O_CLOEXEC", "setpgid", "getsid", "killpg", "getpgrp",
             "sched_getaffinity", "sysconf"):
    delattr(os, name)
from resnet_dist.cli.main import main
"""


def on_windows(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that lacks what Windows lacks."""
    return subprocess.run([sys.executable, "-c", WITHOUT + code, *arguments], capture_output=True, text=True)


def test_help_of_every_verb_is_printed() -> None:
    code = """
from contextlib import suppress
for verb in sys.argv[1:]:
    with suppress(SystemExit):
        main([*verb.split(), "--help"])
"""
    done = on_windows(code, *VERBS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().count("usage: resnet-dist") == len(VERBS)
    assert "resnet-dist train" in on_windows("from resnet_dist.cli.main import entry; entry(['--help'])").stdout


def test_training_says_in_one_line_that_it_needs_another_system(folder: Path, tmp_path: Path) -> None:
    done = on_windows("sys.exit(main(sys.argv[1:]))", "train", str(folder), "-o", str(tmp_path / "run"))
    expected = "resnet-dist train: error: training does not work on Windows; use Linux, or Linux in WSL 2\n"
    assert (done.returncode, done.stderr) == (4, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["check", "split"])
def test_verbs_about_data_work(verb: str, folder: Path, tmp_path: Path) -> None:
    outputs = [str(tmp_path / "photos.csv")] if verb == "split" else []
    source = folder / "train" if verb == "split" else folder
    done = on_windows("sys.exit(main(sys.argv[1:]))", verb, str(source), *outputs)
    assert done.returncode == 0, done.stderr
