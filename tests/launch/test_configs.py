"""The commands of launch/README.md on one machine, and the files that they name."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from resnet_dist.cli.main import main
from resnet_dist.runtime.wording import precision_name
from tests.launch.helpers import (
    LAUNCH,
    Command,
    assert_every_epoch_once,
    assert_trained,
    commands,
    finish,
    free_port,
    kill_training,
    replaced,
    wait_for_epochs,
)

TWO = ["--num_processes", "2"]
# Section, which of its commands, what the machine forces on the launcher, processes, precision that must come of it.
RUNS = [
    ("A laptop", 1, [], 2, "no"),
    ("One GPU", 0, [], 1, "bf16"),
    ("Eight GPUs", 0, TWO, 2, "bf16"),
    ("torchrun", 0, ["--nproc_per_node", "2"], 2, None),
]


def test_command_for_a_laptop(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = replaced(commands("A laptop")[0], {"photos": str(photos), "runs/photos": str(tmp_path / "run")})
    assert command.arguments[0] == "resnet-dist"
    assert main([*command.arguments[1:], "--mixed-precision", "no"]) == 0
    assert_trained(tmp_path / "run", capsys.readouterr().out, processes=1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("section", "number", "launcher", "processes", "precision"),
    RUNS,
)
def test_command_on_one_machine(
    section: str, number: int, launcher: list[str], processes: int, precision: str | None, photos: Path, tmp_path: Path
) -> None:
    """The README's command trains, with as many processes as it says and in the precision of its file."""
    stand_ins = {"photos": str(photos), "runs/photos": str(tmp_path / "run")}
    (said,) = finish(replaced(commands(section)[number], stand_ins, launcher).start())
    assert_trained(tmp_path / "run", said, processes)
    assert precision is None or f"precision {precision_name(precision)} (set by accelerate launch" in said


@pytest.mark.matrix
def test_torchrun_restarts(photos: Path, tmp_path: Path) -> None:
    """After a process was killed the run goes on from its last checkpoint: every epoch once, in order."""
    stand_ins = {"photos": str(photos), "runs/photos": str(tmp_path / "run")}
    command = replaced(commands("torchrun")[0], stand_ins, ["--nproc_per_node", "2"])
    process = replace(command, arguments=[*command.arguments, "--epochs", "12"]).start()
    try:
        wait_for_epochs(tmp_path / "run", 3)
        kill_training(process)
    finally:
        (said,) = finish(process)
    assert "resuming" in said
    assert_every_epoch_once(tmp_path / "run", 12)


@pytest.mark.matrix
def test_commands_for_two_nodes(photos: Path, tmp_path: Path) -> None:
    """Both commands at once on this machine, each with one process."""
    here = {"10.0.0.1": "127.0.0.1", "10.0.0.2": "127.0.0.1", "eth0": "lo"}
    stand_ins = {"photos": str(photos), "runs/photos": str(tmp_path / "run"), **here}
    launcher = [*TWO, "--main_process_port", str(free_port())]
    said = finish(*(replaced(command, stand_ins, launcher).start() for command in commands("Two nodes by hand")))
    assert_trained(tmp_path / "run", "\n".join(said), processes=2)


def test_every_config_file_is_run_by_a_test() -> None:
    configs = {file.name for file in LAUNCH.glob("*.yaml") if "distributed_type" in file.read_text()}
    tried = [commands(section)[number] for section, number, *_ in RUNS] + commands("Two nodes by hand")
    assert configs == {config_file(command) for command in tried} - {None}


def config_file(command: Command) -> str | None:
    words = command.arguments
    return Path(words[words.index("--config_file") + 1]).name if "--config_file" in words else None


@pytest.mark.parametrize("section", ["torchrun", "Two nodes by hand"])
def test_restarts_have_the_settings_that_they_need(section: str) -> None:
    """With the static rendezvous a restarted process never finds the others, with a shared store only sometimes."""
    for command in commands(section):
        assert {"--max-restarts", "--max_restarts"} & set(command.arguments)
        assert {"--standalone", "c10d"} & set(command.arguments)
        assert command.variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda file: file.name)
def test_rendezvous_is_not_in_a_config_file(file: Path) -> None:
    """accelerate ignores it there, without a word."""
    for document in yaml.safe_load_all(file.read_text()):
        assert not {"rdzv_backend", "rdzv_conf"} & set(document)
