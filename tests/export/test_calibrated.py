"""A calibrated run on its way to deployment: eval, export and predict say the same, to the probability."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch.nn import functional as F
from torchvision.models import resnet18

from export.predict import ModelError, Predictor
from export.predict import main as predict
from resnet_dist.cli.main import main
from resnet_dist.model.checkpoint import load_checkpoint
from resnet_dist.model.weights import sha256_of
from tests.conftest import CLASSES, TINY, make_folder

Refused = Callable[..., str]
QUIET = ("--workers", "0", "--threads", "1")


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation labels are wrong for every fourth image, so that it is too sure of itself; calibrated."""
    root = tmp_path_factory.mktemp("calibrated")
    data = make_folder(root / "data", train=20, val=16)
    for number, name in enumerate(CLASSES):
        for file in sorted((data / "val" / name).iterdir())[::4]:
            other = data / "val" / CLASSES[(number + 1) % 3] / f"from_{name}_{file.name}"
            file.rename(other)
    options = [*TINY, "--epochs", "3", "--batch-size", "12", "--opt", "adam", "--save-every", "99epochs"]
    assert main(["train", str(data), *options, "-o", str(root / "run")]) == 0
    best = root / "run/checkpoints/best.safetensors"
    before = sha256_of(best)
    assert main(["eval", str(root / "run"), *QUIET]) == 0
    shutil.copytree(root / "run/eval/val", root / "uncalibrated")
    assert main(["eval", str(root / "run"), "--calibrate", "--precision", "0.5", *QUIET, "--embeddings"]) == 0
    assert sha256_of(best) == before, "calibrating changes no byte of the checkpoint"
    return root / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    assert main(["export", str(run), "-o", str(out), "--embeddings", "--fp16", "--threads", "1"]) == 0
    return out / "model.onnx"


def numbers(folder: Path) -> dict[str, float]:
    values: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return values


def records(folder: Path) -> list[dict[str, str]]:
    return rows((folder / "predictions.csv").read_text())


def test_metrics_equal_scikit_learns_on_the_written_records(run: Path) -> None:
    for folder in (run / "eval/val", run.parent / "uncalibrated"):
        found, lines = numbers(folder), records(folder)
        target, predicted = ([line[name] for line in lines] for name in ("target", "prediction"))
        table = np.zeros((len(lines), 3))
        for row, line in enumerate(lines):
            for rank in (1, 2, 3):
                table[row, CLASSES.index(line[f"top{rank}"])] = float(line[f"p{rank}"])
        assert found["images"] == len(lines) == 48
        assert found["top1"] == pytest.approx(accuracy_score(target, predicted))
        assert found["macro_f1"] == pytest.approx(f1_score(target, predicted, average="macro"))
        table /= table.sum(axis=1, keepdims=True)  # float32 decimals
        written = log_loss(target, table, labels=CLASSES)
        if folder.name == "val":  # calibrated on these images: the loss is cross-fitted, and larger
            assert found["cross_fitted"] == ["loss", "ece"] and written < found["loss"] < 1.2 * written
        else:
            assert found["loss"] == pytest.approx(written, abs=1e-5)


def test_calibrating_lowers_the_loss_and_moves_no_prediction(run: Path) -> None:
    before, after = numbers(run.parent / "uncalibrated"), numbers(run / "eval/val")
    stored = json.loads((run / "checkpoints/calibration.json").read_text())
    assert 0.4 < before["top1"] < 0.99 and after["top1"] == before["top1"]
    assert after["loss"] < before["loss"] and after["ece"] < before["ece"]
    assert stored["measured"]["loss"] == pytest.approx([before["loss"], after["loss"]], rel=1e-5)
    assert stored["temperature"] == after["temperature"] > 1 == before["temperature"]
    for a, b in zip(records(run.parent / "uncalibrated"), records(run / "eval/val"), strict=True):
        assert [a[f"top{n}"] for n in (1, 2, 3)] == [b[f"top{n}"] for n in (1, 2, 3)]
        logits = np.log([float(a[f"p{n}"]) for n in (1, 2, 3)]) / stored["temperature"]
        expected = np.exp(logits) / np.exp(logits).sum()
        assert [float(b[f"p{n}"]) for n in (1, 2, 3)] == pytest.approx(expected, rel=1e-3)


def test_a_later_eval_uses_the_calibration_and_warns_about_its_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if they are given as a separate folder; an evaluation of the training images gives no warning."""
    stored = json.loads((run / "checkpoints/calibration.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(run), str(run.parent / "data/val"), *QUIET, "-o", str(tmp_path / "again")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())  # without the borders of the table
    assert "was fitted on these images" in said and f"cross-fitted, loss is {stored['measured']['loss'][1]:.4f}" in said
    again, first = numbers(tmp_path / "again"), numbers(run / "eval/val")
    assert again["temperature"] == first["temperature"] and again["calibrated_on_these_images"] is True
    assert again["top1"] == first["top1"] and again["loss"] < first["loss"]
    pairs = zip(records(tmp_path / "again"), records(run / "eval/val"), strict=True)
    assert all(float(one["p1"]) == pytest.approx(float(other["p1"]), rel=1e-5) for one, other in pairs)
    assert main(["eval", str(run), *QUIET, "--split", "train", "-o", str(tmp_path / "train")]) == 0
    said = capsys.readouterr().out
    assert "fitted on these images" not in said and "abstained" in said
    assert "calibrated_on_these_images" not in numbers(tmp_path / "train")


def test_a_precision_that_the_images_cannot_show_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    before = (run / "checkpoints/calibration.json").read_bytes()
    said = refused(3, "eval", run, "--calibrate", "--precision", "0.95", *QUIET, "-o", tmp_path / "out")
    assert "--precision 0.95: a class needs at least 59 predicted images" in said and len(said.splitlines()) == 1
    assert (run / "checkpoints/calibration.json").read_bytes() == before and not (tmp_path / "out").exists()


def test_the_exported_model_has_the_same_records(run: Path, exported: Path, tmp_path: Path) -> None:
    data, out = run.parent / "data", tmp_path / "onnx"
    assert main(["eval", str(exported), str(data), *QUIET, "-o", str(out)]) == 0
    assert {f.name for f in out.iterdir()} == {f.name for f in (run.parent / "uncalibrated").iterdir()}
    for a, b in zip(records(run / "eval/val"), records(out), strict=True):
        assert [a[name] for name in ("path", "target", "top1")] == [b[name] for name in ("path", "target", "top1")]
        assert [float(b[name]) for name in ("loss", "p1")] == pytest.approx(
            [float(a[name]) for name in ("loss", "p1")], abs=1e-4
        )
    assert numbers(out)["model"] == "model.onnx"


def test_predict_gives_calibrated_probabilities_and_abstains(
    run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((run / "checkpoints/calibration.json").read_text())
    capsys.readouterr()
    assert predict([str(exported), str(run.parent / "data/val"), "--threads", "1"]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 48
    by_path = {line["path"]: line for line in records(run / "eval/val")}
    limits = dict(zip(CLASSES, stored["thresholds"], strict=True))
    for line in found:
        known = by_path["val/" + "/".join(Path(line["path"]).parts[-2:])]
        assert line["top1"] == known["prediction"]
        assert float(line["p1"]) == pytest.approx(float(known["p1"]), abs=1e-5)
        limit = limits[line["top1"]]
        abstained = limit is None or float(line["p1"]) < limit
        assert line["abstained"] == str(abstained).lower() and line["prediction"] == ("" if abstained else line["top1"])


@pytest.mark.parametrize(("below", "expected"), [("0", 0), ("1", 48)])
def test_abstain_below_replaces_the_thresholds(
    run: Path, exported: Path, capsys: pytest.CaptureFixture[str], below: str, expected: int
) -> None:
    arguments = [str(exported), str(run.parent / "data/val"), "--abstain-below", below]
    predict(arguments)
    assert sum(line["abstained"] == "true" for line in rows(capsys.readouterr().out)) == expected
    predict([*arguments, "--format", "jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(line["abstained"] for line in lines) == expected
    predict([*arguments, "--format", "table"])
    assert capsys.readouterr().out.count("ABSTAINED") == expected


def test_abstaining_is_below_and_not_at_the_limit(exported: Path, run: Path) -> None:
    predictor = Predictor(exported, threads=1)
    file = next((run.parent / "data/val/cat").iterdir())
    (plain,) = predictor.predict([file], abstain_below=0.0)
    (at,) = predictor.predict([file], abstain_below=plain.probabilities[0])
    (above,) = predictor.predict([file], abstain_below=float(np.nextafter(plain.probabilities[0], 2)))
    assert (plain.abstained, at.abstained, above.abstained) == (False, False, True)


def test_features_equal_torchvisions(run: Path, exported: Path) -> None:
    """What the head takes: of the .onnx, of its fp16 copy, of eval --embeddings; and a plain torch forward."""
    network = load_checkpoint(run / "checkpoints/best.safetensors")[0]
    plain = resnet18(num_classes=3)
    plain.conv1, plain.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    plain.load_state_dict(load_file(run / "checkpoints/best.safetensors"))
    plain.fc = torch.nn.Identity()
    predictor, half = (Predictor(exported.with_name(name), threads=1) for name in ("model.onnx", "model.fp16.onnx"))
    files = [run.parent / "data" / line["path"] for line in records(run / "eval/val")]
    pixels = np.stack([predictor.load(file)[1] for file in files])
    given = torch.from_numpy(predictor.inputs(pixels)["pixel_values"])
    with torch.no_grad():
        expected = plain.eval()(given).numpy()
        assert F.linear(torch.from_numpy(expected), network.fc.weight, network.fc.bias).numpy() == pytest.approx(
            predictor.logits(pixels), abs=1e-3
        )
    assert predictor.features(pixels) == pytest.approx(expected, abs=1e-4)
    assert half.features(pixels) == pytest.approx(expected, abs=0.02 * float(np.abs(expected).max()))
    assert np.load(run / "eval/val/embeddings.npy") == pytest.approx(expected, abs=1e-4)
    report = json.loads((exported.parent / "export_report.json").read_text())
    assert 0 <= report["model.onnx"]["cpu"]["max_feature_difference"] < 1e-3


def test_embed_writes_a_row_for_every_image(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((run.parent / "data/val/cat").iterdir())[:2]
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    arguments = [str(exported), str(files[0]), str(bad), str(files[1]), "-b", "2", "--threads", "1"]
    assert predict([*arguments, "--embed", str(tmp_path / "f.npy")]) == 3
    assert predict([*arguments, "--embed", str(tmp_path / "f.csv")]) == 3
    capsys.readouterr()
    table = np.load(tmp_path / "f.npy")
    assert table.shape == (3, 512) and table.dtype == np.float32
    assert np.isnan(table[1]).all() and np.isfinite(table[[0, 2]]).all()
    predictor = Predictor(exported, threads=1)
    (one,) = predictor.predict([files[1]], embed=True)
    assert one.features is not None and table[2] == pytest.approx(one.features, abs=1e-5)
    lines = rows((tmp_path / "f.csv").read_text())
    assert [line["path"] for line in lines] == [str(files[0]), str(bad), str(files[1])]
    assert np.float32(lines[0]["f511"]) == table[0, 511] and lines[1]["f0"] == "nan"


@pytest.mark.parametrize(
    ("name", "said"),
    [("f.txt", "must end in .npy or .csv"), ("none/f.npy", "its folder does not exist"), ("old.npy", "exists")],
)
def test_embed_refuses_before_any_prediction(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "old.npy").write_bytes(b"")
    assert predict([str(exported), str(tmp_path), "--embed", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_embed_needs_an_export_with_embeddings(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict([str(bundle / "model.onnx"), str(tmp_path), "--embed", str(tmp_path / "f.npy")]) == 6
    assert "export it with --embeddings" in capsys.readouterr().err
    with pytest.raises(ModelError, match="the model has no features"):
        next(Predictor(bundle / "model.onnx", threads=1).predict([b""], embed=True))


def test_the_graph_that_takes_pixels_gives_calibrated_probabilities(run: Path, tmp_path: Path) -> None:
    options = ["--preprocess-in-graph", "--embeddings", "--threads", "1", "--images", "8"]
    assert main(["export", str(run), "-o", str(tmp_path / "out"), *options]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "probabilities", "features"]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"image": pixels})
    temperature = json.loads((run / "checkpoints/calibration.json").read_text())["temperature"]
    expected = torch.from_numpy(logits / np.float32(temperature)).softmax(1).numpy()
    assert probabilities == pytest.approx(expected, abs=1e-6)
    assert probabilities != pytest.approx(torch.from_numpy(logits).softmax(1).numpy(), abs=1e-3)


def test_a_calibration_of_other_weights_stops_eval_and_export(run: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copy(run / "checkpoints/calibration.json", tmp_path)
    changed = bytearray((run / "checkpoints/best.safetensors").read_bytes())
    changed[-8] ^= 1  # the last bits of one weight
    (tmp_path / "best.safetensors").write_bytes(changed)
    data, out = str(run.parent / "data"), str(tmp_path / "out")
    for arguments in (["eval", data, *QUIET], ["export", "--data", data, "--threads", "1"]):
        verb, *others = arguments
        said = refused(6, verb, tmp_path / "best.safetensors", *others, "-o", out)
        assert "calibration.json: it does not belong to" in said and "eval --calibrate" in said
    assert main(["eval", str(tmp_path / "best.safetensors"), data, "--calibrate", *QUIET, "-o", out]) == 0
    assert main(["eval", str(tmp_path / "best.safetensors"), data, *QUIET, "-o", out]) == 0


def test_augmented_evaluation_averages_probabilities(run: Path, tmp_path: Path) -> None:
    """Against a loop over single images, crops and mirror images in plain torch and Pillow.

    The crops are of the central square of 18, at (2, 0); the one view of a plain evaluation is at (2, 1).
    """
    assert main(["eval", str(run), *QUIET, "--tta", "crops", "-o", str(tmp_path / "crops")]) == 0
    assert main(["eval", str(run), *QUIET, "--tta", "flip", "-o", str(tmp_path / "flip")]) == 0
    network, description = load_checkpoint(run / "checkpoints/best.safetensors")
    temperature = json.loads((run / "checkpoints/calibration.json").read_text())["temperature"]
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (description.preprocessing.mean, description.preprocessing.std)
    )
    for kind, boxes in (("crops", [(1, 1), (0, 0), (2, 0), (0, 2), (2, 2)]), ("flip", [(0, 1)])):
        for line in records(tmp_path / kind)[:6]:
            with Image.open(run.parent / "data" / line["path"]) as image:
                small = image.resize((21, 18), Image.Resampling.BILINEAR).crop((2, 0, 20, 18))
            probabilities = []
            for x, y in boxes:
                crop = torch.from_numpy(np.array(small.crop((x, y, x + 16, y + 16)))).permute(2, 0, 1) / 255
                for view in (crop, crop.flip(2)):
                    with torch.no_grad():
                        probabilities.append((network(((view - mean) / std)[None])[0] / temperature).softmax(0))
            expected = torch.stack(probabilities).mean(0)
            assert line["prediction"] == CLASSES[int(expected.argmax())]
            assert float(line["p1"]) == pytest.approx(float(expected.max()), abs=1e-4)
            target = float(expected[CLASSES.index(line["target"])])
            assert float(line["loss"]) == pytest.approx(-np.log(target), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--calibrate", "--split", "test"], "--calibrate needs --split val"),
        (["--precision", "0.9"], "--precision needs --calibrate"),
        (["--calibrate", "--precision", "1.5"], "--precision 1.5: must be above 0 and below 1"),
        (["--calibrate", "--precision", "1"], "--precision 1: must be above 0 and below 1"),
        (["--calibrate", "--tta", "flip"], "--tta cannot be combined with --calibrate"),
        (["--tta", "rotate"], "must be one of none, flip, crops"),
    ],
)
def test_eval_refuses_contradicting_options(run: Path, refused: Refused, arguments: list[str], said: str) -> None:
    assert said in refused(2, "eval", run, *arguments)


def test_eval_of_a_file_needs_images_and_a_place(exported: Path, refused: Refused) -> None:
    said = refused(2, "eval", exported, "--calibrate")
    assert all(word in said for word in ("DATA is missing", "--output-dir is missing", "--calibrate and --embeddings"))


def test_eval_of_a_damaged_export_is_one_line(exported: Path, run: Path, tmp_path: Path, refused: Refused) -> None:
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(data)
    said = refused(6, "eval", tmp_path / "model.onnx", run.parent / "data", *QUIET, "-o", tmp_path / "out")
    assert "damaged or changed" in said
