"""`predict.py` alone: inputs, outputs, bad images, and files that are refused."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export.predict import ModelError, Predictor, main, self_test_pixels
from tests.conftest import write_image
from tests.export.conftest import resealed


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(5):
        write_image(folder / f"sub{number % 2}" / f"{number}.png", seed=number, tint=number, size=(30, 22))
    return folder


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_folders_files_patterns_and_lists_give_the_same(
    bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bundle / "model.onnx"
    files = sorted(str(file) for file in photos.rglob("*.png"))
    expected = table(run(capsys, model, photos)[1])
    assert [row["path"] for row in expected] == files
    assert table(run(capsys, model, *files)[1]) == expected
    assert sorted(map(str, table(run(capsys, model, photos / "*" / "*.png")[1]))) == sorted(map(str, expected))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(files) + "\n"))
    assert table(run(capsys, model, "-")[1]) == expected


def test_batches_and_threads_change_nothing(bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [
        table(run(capsys, bundle / "model.onnx", photos, "-b", size, "--threads", threads)[1])
        for size, threads in ((1, 1), (2, 2), (64, 1))
    ]
    for other in tables[1:]:
        assert [row["top1"] for row in other] == [row["top1"] for row in tables[0]]
        found, expected = ([float(row["p1"]) for row in rows] for rows in (other, tables[0]))
        assert found == pytest.approx(expected, rel=1e-4)


def test_formats(bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = bundle / "model.onnx"
    as_csv = table(run(capsys, model, photos, "--top-k", "2")[1])
    assert list(as_csv[0]) == ["path", "prediction", "top1", "top2", "p1", "p2", "abstained", "error"]
    lines = [
        json.loads(line) for line in run(capsys, model, photos, "--format", "jsonl", "--top-k", "9")[1].splitlines()
    ]
    for row, line in zip(as_csv, lines, strict=True):
        assert line["predictions"][0]["class"] == row["prediction"] and len(line["predictions"]) == 3
        assert sum(item["p"] for item in line["predictions"]) == pytest.approx(1, abs=1e-6)
    assert (
        f"{as_csv[0]['path']}  {as_csv[0]['top1']} {float(as_csv[0]['p1']):.3f}"
        in run(capsys, model, photos, "--format", "table")[1]
    )
    assert run(capsys, model, photos, "--output", tmp_path / "out.csv")[0] == 0
    assert len(table((tmp_path / "out.csv").read_text())) == 5


def test_excel_cells_are_inert(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that a spreadsheet would compute get an apostrophe; everything else is the csv."""
    monkeypatch.chdir(tmp_path)
    names = [f"{start}1+1.png" for start in ("", "+", "-", "=", "@")]
    for name in names:
        write_image(tmp_path / name, seed=1)
    plain, inert = (
        table(run(capsys, bundle / "model.onnx", *paths, "--format", "excel")[1])
        for paths in ([Path.cwd() / name for name in names], ["*.png"])
    )
    assert [row["path"] for row in plain] == [str(tmp_path / name) for name in names]
    assert sorted(row["path"] for row in inert) == sorted(["1+1.png", *(f"'{name}" for name in names[1:])])
    assert all(row["p1"][0].isdigit() for row in inert)


def test_library_takes_paths_bytes_and_pillow_images(bundle: Path, photos: Path) -> None:
    predictor = Predictor(bundle / "model.onnx", threads=1)
    file = next(iter(sorted(photos.rglob("*.png"))))
    with Image.open(file) as opened:
        found = list(predictor.predict([file, str(file), file.read_bytes(), opened.copy()], top_k=2))
    assert len({(p.classes, p.probabilities) for p in found}) == 1 and len(found[0].classes) == 2


def test_rotated_photographs_are_turned_upright(bundle: Path, tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    predictor = Predictor(bundle / "model.onnx", threads=1)
    a, b = (predictor.load(tmp_path / f"{name}.png")[1] for name in ("turned", "upright"))
    assert a is not None and b is not None and np.array_equal(a, b)


def test_bad_images_are_lines_and_exit_code_3(bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = photos / "sub0" / "1bad.png"
    bad.write_bytes(b"this is text")
    code, out, err = run(capsys, bundle / "model.onnx", photos, photos / "gone.jpg")
    rows = table(out)
    assert code == 3 and len(rows) == 7 and "2 images could not be read" in err
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert set(errors) == {str(bad), str(photos / "gone.jpg")}
    assert "not an image" in errors[str(bad)] and "No such file" in errors[str(photos / "gone.jpg")]
    assert all(row["prediction"] and not row["error"] for row in rows if row["path"] not in errors)
    code, out, _ = run(capsys, bundle / "model.onnx", photos, "--strict")
    assert code == 3 and table(out)[-1]["path"] == str(bad) and len(table(out)) < 6


def test_nothing_is_read_from_the_network(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, bundle / "model.onnx", "https://example.org/cat.jpg")
    assert code == 2 and "URLs are not supported" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "INPUT is missing"),
        (["x.png", "--top-k", "0"], "--top-k"),
        (["x.png", "--formt", "csv"], "unrecognized arguments"),
        (["x.png", "--output", "/proc/nowhere/x.csv"], "cannot be written"),
        (["x.png", "--providers", "abacus"], "this onnxruntime has"),
    ],
)
def test_wrong_command_lines(bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, _, err = run(capsys, bundle / "model.onnx", *arguments)
    assert code in (2, 6) and said in err and len(err.splitlines()) == 1


def test_an_output_that_exists_is_not_overwritten(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.csv").write_text("years")
    assert run(capsys, bundle / "model.onnx", photos, "--output", tmp_path / "thesis.csv")[0] == 2
    assert (tmp_path / "thesis.csv").read_text() == "years"


def test_grid(bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, bundle / "model.onnx", photos, "--save-grid", tmp_path / "grid.png")[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (672, 368) and np.asarray(grid).std() > 10


@pytest.mark.parametrize("name", ["model.onnx", "model.fp16.onnx", "model.int8.onnx"])
def test_self_test(bundle: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The expected logits are torch's for the float file; here they are computed from the formula's image again."""
    code, out, _ = run(capsys, bundle / name, "--verify")
    assert code == 0 and "checksum and self-test pass" in out
    predictor = Predictor(bundle / name, threads=1)
    size = predictor.preprocessing.img_size
    pixels = np.array([(i * 2654435761 >> 24) & 255 for i in range(size * size * 3)], np.uint8)
    assert np.array_equal(self_test_pixels(size).ravel(), pixels)
    assert predictor.logits(pixels.reshape(1, size, size, 3))[0] == pytest.approx(
        predictor.metadata["self_test"], rel=1e-3, abs=1e-3
    )


def test_self_test_notices_other_weights(bundle: Path, tmp_path: Path) -> None:
    """A file whose weights were changed, and whose checksum was made to fit."""
    model = onnx.load(bundle / "model.onnx")
    weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * np.float32(1.5)).tobytes()
    path = resealed(model, tmp_path / "changed.onnx")
    with pytest.raises(ModelError, match="the self-test fails"):
        Predictor(path, threads=1).verify()


def test_every_flipped_bit_is_noticed(bundle: Path, tmp_path: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 25):
        changed = bytearray(data)
        changed[place] ^= 1 << (int(place) % 8)
        (tmp_path / "x.onnx").write_bytes(changed)
        with pytest.raises(ModelError):
            Predictor(tmp_path / "x.onnx", threads=1)


def test_files_that_are_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not ONNX, truncated, foreign, with external data, a folder, nothing: one line, exit code 6."""
    data = (bundle / "model.onnx").read_bytes()
    (tmp_path / "truncated.onnx").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    foreign = onnx.load(bundle / "model.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    outside = onnx.load(bundle / "model.onnx")
    onnx.save(outside, tmp_path / "external.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    for name in ("truncated.onnx", "text.onnx", "empty.onnx", "folder", "foreign.onnx", "external.onnx", "none.onnx"):
        code, _, err = run(capsys, tmp_path / name, "x.png")
        assert code == 6 and str(tmp_path / name) in err and len(err.splitlines()) == 1, name


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["a", "b"]},
        {"classes": [1, 2, 3]},
        {"classes": "abc"},
        {"temperature": 0},
        {"temperature": "hot"},
        {"precision": "int1"},
        {"preprocessing": None},
        {"self_test": None},
    ],
)
def test_metadata_that_does_not_fit_is_refused(bundle: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    model = onnx.load(bundle / "model.onnx")
    (entry,) = (p for p in model.metadata_props if p.key == "resnet_dist")
    entry.value = json.dumps({**json.loads(entry.value), **changes})
    with pytest.raises(ModelError, match="not a model that resnet-dist exported"):
        Predictor(resealed(model, tmp_path / "x.onnx"), threads=1)


def test_temperature_softens_and_keeps_the_order(bundle: Path, tmp_path: Path, photos: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    (entry,) = (p for p in model.metadata_props if p.key == "resnet_dist")
    entry.value = json.dumps({**json.loads(entry.value), "temperature": 2.5})
    warm, plain = (
        Predictor(resealed(model, tmp_path / "x.onnx"), threads=1),
        Predictor(bundle / "model.onnx", threads=1),
    )
    files = sorted(photos.rglob("*.png"))
    for a, b in zip(warm.predict(files), plain.predict(files), strict=True):
        assert a.classes == b.classes and a.probabilities[0] < b.probabilities[0]
        powers = np.array(b.probabilities) ** (1 / 2.5)
        assert a.probabilities == pytest.approx(powers / powers.sum(), rel=1e-4)


def test_predict_py_runs_alone_without_torch(bundle: Path, photos: Path) -> None:
    """From the bundle's folder, with torch, onnx and resnet_dist made impossible to import."""
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'onnx', 'resnet_dist', 'scipy']));"
    start = "sys.argv[0] = 'predict.py'; import runpy; runpy.run_path('predict.py', run_name='__main__')"
    command = [sys.executable, "-I", "-c", block + start, "model.onnx", str(photos), "--threads", "1"]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(table(done.stdout)) == 5
    code = "import sys, runpy; runpy.run_path('predict.py'); print({m[:5] for m in sys.modules} & {'torch', 'resne'})"
    listed = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == "set()"


def test_control_characters_in_names_do_not_reach_the_terminal(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "\x1b[31mred.png", seed=0)
    _, out, _ = run(capsys, bundle / "model.onnx", tmp_path, "--format", "table")
    assert "\x1b" not in out and "\\x1b[31mred.png" in out


def test_closed_pipe_is_no_error(bundle: Path, photos: Path) -> None:
    command = f"{sys.executable} -m resnet_dist predict {bundle}/model.onnx {photos} --threads 1 | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.stdout.startswith("path,prediction") and "Traceback" not in done.stderr
