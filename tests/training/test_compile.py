"""Compiling changes the speed of a step and not what it computes; by itself only where it pays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resnet_dist.cli.main import main
from resnet_dist.errors import UsageError
from resnet_dist.model.head import Dropout
from resnet_dist.training import loop, plan
from resnet_dist.training.compile import check_graphs, pays
from resnet_dist.training.loop import train
from tests.conftest import TINY
from tests.training.helpers import job_of

SHORT = [*TINY, "--trainable", "layer4 head", "--epochs", "2", "-b", "8", "--log-every", "1", "--lr", "0.001"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.matrix
@pytest.mark.filterwarnings("default")  # torch's compiler has warnings of its own
def test_compiled_steps_equal_plain_steps(folder: Path, tmp_path: Path) -> None:
    """Dropout's masks, which differ from step to step, included. What is frozen is computed once and not compiled."""
    if shutil.which("g++") is None:
        pytest.skip("torch's compiler needs g++ on a CPU")
    for how in ("off", "on"):
        train(job_of(tmp_path / how, folder, *SHORT, "--dropout", "0.5", "--aug", "none", "--compile", how))
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)


def test_auto_compiles_once_it_pays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pays_at_last(_: torch.device, left: int, seconds: float) -> bool:
        asked.append(left)
        assert seconds > 0
        return left <= 4

    calls: list[int] = []

    def counted(net: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: calls.append(len(images)) or net(images)

    monkeypatch.setattr(loop, "pays", pays_at_last)
    monkeypatch.setattr(loop, "compiled", counted)
    train(job_of(tmp_path / "auto", folder, *SHORT))
    assert asked == [5, 4] and calls == [8] * 4  # six steps in all, asked after the first and the second
    train(job_of(tmp_path / "off", folder, *SHORT, "--compile", "off"))
    assert losses(tmp_path / "auto") == losses(tmp_path / "off")


def test_graphs_are_asked_for_and_steps_are_marked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that only notes what arrives: the losses of plain steps, a mark before each call, and the keys of
    dropout always at one address, as torch replays a graph with the addresses that modules held when it was recorded.
    """
    options = [*SHORT, "--dropout", "0.5", "--head", "mlp", "--ema"]
    expected = tmp_path / "off"
    train(job_of(expected, folder, *options, "--compile", "off"))
    events: list[str] = []
    places = set[int]()

    def compiler(net: torch.nn.Module, **how: object) -> Callable[[torch.Tensor], torch.Tensor]:
        events.append(f"compile {how}")

        def forward(values: torch.Tensor) -> torch.Tensor:
            events.append("forward")
            places.update(m.keys.data_ptr() for m in net.modules() if isinstance(m, Dropout) and m.keys is not None)
            return net(values)

        return forward

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: events.append("mark"))
    monkeypatch.setattr(plan, "check_graphs", lambda _: None)
    train(job_of(tmp_path / "graphs", folder, *options, "--compile", "graphs"))
    assert events == ["compile {'dynamic': False, 'mode': 'reduce-overhead'}", *["mark", "forward"] * 6]
    assert len(places) == 1
    assert losses(tmp_path / "graphs") == losses(expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [([], "CUDA graphs need a GPU, not cpu"), (["--grad-accum", "2"], "does not work with --grad-accum")],
)
def test_graphs_are_refused_in_one_line(
    folder: Path, options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(folder), *SHORT, "--compile", "graphs", *options]) == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said


def test_graphs_are_for_one_process() -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    check_graphs(on_gpu)
    on_gpu.num_processes = 2
    with pytest.raises(UsageError, match="one process only"):
        check_graphs(on_gpu)


def test_compile_is_chosen_if_it_saves_time() -> None:
    assert not pays(torch.device("cpu"), 10**6, 1.0)
    assert pays(torch.device("cuda"), 10_000, 0.1)
    assert not pays(torch.device("cuda"), 1_000, 0.1)
