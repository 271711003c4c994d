"""`export --providers` verifies with every provider; `predict` warns if it runs with another one."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export.predict import Predictor, main
from export.providers import providers_to_verify
from export.serve import server
from resnet_dist.cli.main import main as program
from tests.conftest import CLASSES, write_image

Refused = Callable[..., str]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
RealSession = onnxruntime.InferenceSession


class FakeGpu:
    """onnxruntime's session on a GPU that computes like the CPU, and with TF32 unless that is switched off.

    With `starts` false, it behaves as onnxruntime does without a driver: the session runs on the CPU only.
    """

    starts = True

    def __init__(
        self, model: Any, options: Any, providers: Sequence[str], settings: Sequence[dict[str, str]], **rest: Any
    ) -> None:
        self.real = RealSession(model, options, [CPU], **rest)
        by_name = dict(zip(providers, settings, strict=True))
        self.on_gpu = self.starts and CUDA in by_name
        self.exact = by_name.get(CUDA, {}).get("use_tf32", "1") == "0"
        self.names = [name for name in by_name if name != CUDA or self.on_gpu]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return list(dict.fromkeys([*self.names, CPU]))

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self.on_gpu and not self.exact:  # 10 bits after the point instead of 23
            feed = {
                name: (value.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for name, value in feed.items()
            }
        outputs: list[np.ndarray] = self.real.run(names, feed)
        return outputs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeGpu]:
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeGpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(FakeGpu, "starts", True)
    return FakeGpu


def report_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "export_report.json").read_text())
    return values


def test_every_file_is_verified_with_every_provider(
    small_run: Path, tmp_path: Path, gpu: type[FakeGpu], capsys: pytest.CaptureFixture[str]
) -> None:
    """By default with those that `predict` takes: here the GPU, in full precision, and the CPU."""
    assert program(["export", str(small_run), "-o", str(tmp_path / "out"), "--fp16", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    report = report_of(tmp_path / "out")
    for name in ("model.onnx", "model.fp16.onnx"):
        assert list(report[name]) == ["cuda", "cpu"] and report[name]["cuda"] == report[name]["cpu"]
        assert Predictor(tmp_path / "out" / name, 1, "cpu").verified_with == ("cuda", "cpu")
        assert f"{name:<16} cuda: 18 images" in said and f"{name:<16} cpu: 18 images" in said
    assert report["runtime"]["onnxruntime"] == onnxruntime.__version__
    cuda, cpu = report["runtime"]["providers"].values()
    assert cuda["options"] == {"use_tf32": "0"} and cuda["device"] and "cpu_flags" not in cuda
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    assert set(cpu["cpu_flags"]) <= set(flags.split()) and ("avx2" in cpu["cpu_flags"]) == ("avx2" in flags.split())
    assert f"provider cpu: {cpu['device']}, onnxruntime {onnxruntime.__version__}" in said and "(use_tf32=0)" in said


def test_the_gate_refuses_tf32(
    small_run: Path, tmp_path: Path, gpu: type[FakeGpu], monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """Without the option that switches it off, the same export is refused, and the line names the provider."""
    monkeypatch.setattr("export.predict.PROVIDER_OPTIONS", {})
    said = refused(6, "export", small_run, "-o", tmp_path / "out", "--threads", "1", "--providers", "cpu,cuda")
    assert (
        "model.onnx with cuda: " in said and "logits are off by" in said and not (tmp_path / "out/model.onnx").exists()
    )
    report = report_of(tmp_path / "out")
    assert report["model.onnx"]["cuda"]["problems"] and not report["model.onnx"]["cpu"]["problems"]


def test_a_provider_that_is_not_available_is_one_line(
    small_run: Path, bundle: Path, tmp_path: Path, gpu: type[FakeGpu], monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(gpu, "starts", False)
    said = refused(2, "export", small_run, "-o", tmp_path / "out", "--providers", "cpu,cuda")
    assert "--providers cuda: cuda is part of this onnxruntime but does not start here" in said
    said = refused(2, "export", small_run, "-o", tmp_path / "out", "--providers", "openvino")
    assert "has only cuda, cpu" in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert providers_to_verify("auto") == ["cpu"]
    assert "does not start here" in refused(6, "predict", bundle, "x.png", "--providers", "cuda,cpu")
    assert Predictor(bundle, 1).provider == "cpu"


def test_a_provider_that_raises_is_left_out_by_auto(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA does on a machine that has its libraries and no GPU. Nothing reaches standard output."""

    def session(model: Any, options: Any, providers: Sequence[str], settings: Any, **rest: Any) -> Any:
        if CUDA in providers:
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
        return RealSession(model, options, providers, settings, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert Predictor(bundle, 1).provider == "cpu" and providers_to_verify("auto") == ["cpu"]
    with pytest.raises(ValueError, match="CUDA failure 100"):
        Predictor(bundle, 1, "cuda")


def test_predict_warns_with_a_provider_that_was_not_verified(
    bundle: Path, tmp_path: Path, gpu: type[FakeGpu], capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png", seed=1)
    shutil.copy(bundle / "model.onnx", tmp_path)
    arguments = [str(tmp_path / "model.onnx"), str(tmp_path / "a.png"), "--threads", "1"]
    rows = []
    for providers, warned in (("cpu", 0), ("auto", 1), ("cuda", 1)):
        assert main([*arguments, "--providers", providers]) == 0
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == warned and all("runs with cuda" in line and "with cpu only" in line for line in lines)
        rows.append(said.out)
    assert rows[0] == rows[1] == rows[2] and CLASSES[0] in rows[0]


def test_serve_warns_too(
    bundle: Path,
    tmp_path: Path,
    gpu: type[FakeGpu],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(bundle / "model.onnx", tmp_path)
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    for providers, warned in (("cpu", 0), ("cuda", 1)):
        words = [str(tmp_path / "model.onnx"), "--port", "0", "--threads", "1", "--providers", providers]
        assert program(["serve", *words]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == warned and all("runs with cuda" in line and "with cpu only" in line for line in lines)
