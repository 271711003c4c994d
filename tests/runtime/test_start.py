"""Before training: what the launcher says, what the machine has, and whether the processes agree."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.cli.main import main
from resnet_dist.config.schema import SystemConfig
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.runtime import accelerate as distributed
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import check_gpus, launch_warnings, start
from tests.conftest import TINY

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OF_LAUNCHERS = [*WHOLE, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set these variables of a launcher, and no others."""

    def give(**values: str) -> None:
        for name in OF_LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


def subsets() -> list[tuple[str, ...]]:
    names = list(WHOLE)
    return [tuple(name for bit, name in enumerate(names) if number >> bit & 1) for number in range(2 ** len(names))]


def test_launcher_variables_set_in_part(variables: Any) -> None:
    """All, none, or an address without a rank are valid; for every other subset the error lists what is missing."""
    for names in subsets():
        variables(**{name: WHOLE[name] for name in names})
        if set(names) in ({*WHOLE}, set(), {"MASTER_ADDR"}, {"MASTER_PORT"}, {"MASTER_ADDR", "MASTER_PORT"}):
            launcher.check()
            continue
        with pytest.raises(MachineError) as raised:
            launcher.check()
        said = str(raised.value)
        assert all(name in said.partition(" set, but ")[2] for name in set(WHOLE) - set(names)), said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"RANK": "first"}, "RANK=first: must be an integer"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2: must be an integer"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be an integer in 0..65535"),
        ({"RANK": "2"}, "contradict"),
        ({"WORLD_SIZE": "0"}, "contradict"),
        ({"LOCAL_RANK": "2"}, "contradict"),
        ({"LOCAL_WORLD_SIZE": "1"}, "contradict"),
        ({"LOCAL_WORLD_SIZE": "3"}, "contradict"),
    ],
)
def test_launcher_variables_that_cannot_be(values: dict[str, str], said: str, variables: Any) -> None:
    variables(**WHOLE, **{"LOCAL_WORLD_SIZE": "2"})
    launcher.check()
    variables(**{**WHOLE, **values})
    with pytest.raises(MachineError, match=said):
        launcher.check()


def test_half_set_variables_are_one_line(variables: Any, folder: Path, refused: Any) -> None:
    """Of a single process, RANK=0 and WORLD_SIZE=1 are as good as none."""
    variables(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    said = refused(4, "train", folder, *TINY, "--dry-run")
    assert said.count("\n") == 1 and "MASTER_ADDR, MASTER_PORT" in said
    variables(RANK="zero", WORLD_SIZE="1")  # also where only an error is printed
    assert refused(2, "train", folder, "--epochs", "0")
    variables(RANK="0", WORLD_SIZE="1")
    launcher.check()
    assert start(SystemConfig(threads=1, mixed_precision="no"))[0].num_processes == 1


# The launcher as the parent


def test_only_a_launcher_that_is_the_parent_counts(variables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_parent_is_python", lambda: True)
    variables()
    assert not launcher.has_launcher() and not launcher.is_orphan()
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        variables(**{name: "no"})
        assert launcher.has_launcher()
    monkeypatch.setattr(launcher, "_parent_is_python", lambda: False)
    assert not launcher.has_launcher(), "a shell that may end before its processes"
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid())
    assert not launcher.is_orphan(), "accelerate launch starts a single process in its own session"
    variables(TORCHELASTIC_RUN_ID="none")
    assert launcher.is_orphan()
    monkeypatch.setattr(os, "getsid", lambda _: 1)
    assert not launcher.is_orphan(), "torchrun started a script that started this process"


def test_one_process_instead_of_several(variables: Any) -> None:
    """As `accelerate launch --cpu --num_processes 2` starts it."""
    several = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    variables(**several, ACCELERATE_USE_CPU="True")
    _, line = start(SystemConfig(threads=1))
    assert "\nWARNING: accelerate launch was configured for several processes" in line
    variables(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_CPU="True")
    assert "WARNING" not in start(SystemConfig(threads=1))[1]
    variables(**several, WORLD_SIZE="2")
    assert not launcher.is_one_of_several()


# GPUs


@pytest.mark.parametrize(
    ("processes", "seen", "variable", "words"),
    [
        (8, 4, None, "8 processes on this machine, but this one sees 4 GPUs (CUDA_VISIBLE_DEVICES is not set)"),
        (4, 1, "2", "4 processes on this machine, but this one sees 1 GPU (CUDA_VISIBLE_DEVICES=2)"),
        (2, 1, "MIG-1", "2 processes on this machine, but this one sees 1 GPU (CUDA_VISIBLE_DEVICES=MIG-1)"),
        (4, 4, None, None),
        (1, 4, None, None),
    ],
)
def test_more_processes_than_gpus(
    processes: int, seen: int, variable: str | None, words: str | None, variables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    variables(**WHOLE, LOCAL_WORLD_SIZE=str(processes))
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    check_gpus(on_cpu=True)
    if words is None:
        check_gpus(on_cpu=False)
    else:
        with pytest.raises(UsageError) as raised:
            check_gpus(on_cpu=False)
        assert str(raised.value).startswith(words) and "\n" not in str(raised.value)


def test_gpus_of_one_machine_among_several(variables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every launcher says how many processes a machine has: the number of this one there says how many at least."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    variables(**WHOLE | {"WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "7"})
    launcher.check()
    check_gpus(on_cpu=False)
    variables(**WHOLE | {"WORLD_SIZE": "16", "RANK": "8", "LOCAL_RANK": "8"})
    with pytest.raises(UsageError, match=r"^at least 9 processes on this machine, but this one sees 8 GPUs "):
        check_gpus(on_cpu=False)


@pytest.mark.parametrize(
    ("asked", "chosen", "has_bf16", "warns"),
    [
        ("auto", "no", True, True),
        ("auto", "no", False, False),
        ("no", "no", True, False),
        ("auto", "bf16", True, False),
    ],
)
def test_a_launchers_no_on_a_gpu_with_bf16(
    asked: str, chosen: str, has_bf16: bool, warns: bool, variables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(ACCELERATE_MIXED_PRECISION="no")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    said = list(launch_warnings(asked, chosen, on_cpu=False))
    assert bool(said) == warns and list(launch_warnings(asked, "no", on_cpu=True)) == []
    assert all("accelerate launch --mixed_precision bf16" in line for line in said)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_on_a_cpu_without_it_warns(has_bf16: bool, variables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variables()
    monkeypatch.setattr(distributed.launcher, "cpu_has_bf16", lambda: has_bf16)
    said = list(launch_warnings("bf16", "bf16", on_cpu=True))
    assert said == [] if has_bf16 else "emulates it" in said[0]


class Processes:
    """An Accelerator of several processes on CPUs."""

    num_processes, device = 3, torch.device("cpu")


def fact(**changed: str) -> dict[str, str]:
    """What one process says of itself."""
    same = {"precision": "bf16", "device": "A100", "kind": "(8, 0)", "resnet-dist": "1", "torch": "2.15"}
    return {**same, "torchvision": "0.29", **changed}


@pytest.mark.parametrize(
    ("facts", "problems"),
    [
        ([fact()] * 3, []),
        (
            [fact(), fact(precision="fp16", device="V100", kind="(7, 0)"), fact()],
            [
                "the processes chose different precisions (bf16 on rank 0, 2; fp16 on rank 1); give all of them the "
                "same, such as --mixed-precision fp16",
                "the processes have different kinds of GPU (A100 on rank 0, 2; V100 on rank 1); start it on GPUs of "
                "one kind",
            ],
        ),
        (
            [fact(), fact(torch="2.14"), fact(**{"resnet-dist": "2"})],
            [
                "the processes have different versions of resnet-dist (1 on rank 0, 1; 2 on rank 2); install the same "
                "on all machines",
                "the processes have different versions of torch (2.14 on rank 1; 2.15 on rank 0, 2); install the same "
                "on all machines",
            ],
        ),
    ],
)
def test_processes_that_do_not_go_together_are_refused(
    facts: list[dict[str, str]], problems: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather_object", lambda own: facts if own[0].keys() == facts[0].keys() else [])
    accelerator: Any = Processes()
    if not problems:
        assert distributed.compare_processes(accelerator, "bf16") == []
        return
    with pytest.raises(UsageError) as raised:
        distributed.compare_processes(accelerator, "bf16")
    assert raised.value.problems == problems


def test_gpus_of_one_kind_with_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [fact(), fact(), fact(device="A100 80GB")]
    monkeypatch.setattr(distributed, "gather_object", lambda _: facts)
    accelerator: Any = Processes()
    said = ["the processes have different devices: A100 on rank 0, 1; A100 80GB on rank 2"]
    assert distributed.compare_processes(accelerator, "bf16") == said


def test_processes_with_different_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not in what depends on the machine, such as --workers."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(distributed, "gather_object", lambda own: found.extend(own) or found)
    accelerator: Any = Processes()
    for workers in (0, 4):
        settings = {"recipe": "bn-only", "optim": {"lr": 0.1}, "data": {"workers": workers}, "phase": [{"epochs": 1}]}
        distributed.compare_settings(accelerator, settings)
    with pytest.raises(UsageError) as raised:
        distributed.compare_settings(accelerator, {"recipe": "bn-only", "optim": {}, "phase": [{"epochs": 2}]})
    assert raised.value.problems == [
        "the processes have different settings of --lr (0.1 on rank 0, 1; not given on rank 2); give all of them the "
        "same",
        "the processes have different settings of --phase ([{'epochs': 1}] on rank 0, 1; [{'epochs': 2}] on rank 2); "
        "give all of them the same",
    ]


def test_train_compares_its_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed, "compare_settings", lambda _, settings: seen.append(settings))
    assert main(["train", str(folder), *TINY, "--lr", "0.3", "--dry-run"]) == 0
    (settings,) = seen
    assert settings["optim"]["lr"] == 0.3 and "output_dir" not in settings["run"]


def test_the_time_limit_of_the_settings_is_that_of_the_connections(variables: Any) -> None:
    variables()
    accelerator, _ = start(SystemConfig(dist_timeout=7))
    assert accelerator.init_handler is not None and accelerator.init_handler.timeout == timedelta(minutes=7)


def test_deterministic_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    start(SystemConfig(threads=1, mixed_precision="no"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    start(SystemConfig(threads=1, mixed_precision="no", deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    torch.use_deterministic_algorithms(False)


# Cores

GROUPS: dict[str, tuple[dict[str, str], str, float]] = {
    "version 2, of this group": ({"cpu.max": "200000 100000"}, "0::/", 2.0),
    "version 2, no limit": ({"cpu.max": "max 100000"}, "0::/", float("inf")),
    "version 2, of a group above": ({"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 1.5),
    "version 2, the smallest": ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
    "version 2, seen from outside": ({"cpu.max": "300000 100000"}, "0::/docker/0123", 3.0),
    "version 1": ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", 2.5),
    "version 1, two controllers": (
        {"cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "cpu,cpuacct/x/cpu.cfs_period_us": "50000"},
        "4:cpu,cpuacct:/x",
        2.0,
    ),
    "version 1, no limit": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", float("inf")),
    "another controller": ({"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, "3:cpuset:/", float("inf")),
    "damaged": ({"cpu.max": "many"}, "0::/", float("inf")),
}


@pytest.mark.parametrize("name", GROUPS)
def test_cpu_quota(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, group, cpus = GROUPS[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content + "\n")
    lines = launcher._lines
    monkeypatch.setattr(launcher, "_lines", lambda file: [group] if file == "/proc/self/cgroup" else lines(file))
    monkeypatch.setattr(launcher, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert launcher.cpu_quota(tmp_path) == cpus
    assert launcher.cores() == {0.5: 1, 1.5: 2, 2.0: 2, 2.5: 3, 3.0: 3}.get(cpus, 64)


def test_this_machine_has_cores() -> None:
    assert 1 <= launcher.cores() <= (os.cpu_count() or 1)


# The working directory


def test_files_of_the_working_directory_are_not_ours(tmp_path: Path) -> None:
    """No module with the name of one of ours, of a library or of Python."""
    from tests.conftest import run_program

    for name in ("export", "torch", "typing_extensions", "argparse", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export/__init__.py").write_text("raise SystemExit('the wrong one')\n")
    done = run_program("predict", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "resnet-dist predict" in done.stdout, done.stderr
    done = run_program("summary", "--model", "resnet18", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert main(["summary", "--model", "resnet18"]) == 0
