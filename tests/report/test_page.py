"""The page is whole by itself, shows what is on disk, and nothing in a name can become a part of it."""

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from export import predict
from export.predict import Preprocessing
from resnet_dist.cli.main import main
from resnet_dist.data import check
from resnet_dist.data import pictures as data_pictures
from resnet_dist.data.check import look, report_on, summary
from resnet_dist.errors import ArtifactError
from resnet_dist.report import page_content
from resnet_dist.report import pictures as report_pictures
from resnet_dist.report.on_disk import read_evaluation
from resnet_dist.report.page import write_page
from resnet_dist.report.page_content import evaluation_content
from resnet_dist.report.pictures import pictures
from tests.conftest import CLASSES, WITH_REPORT, make_folder, write_image
from tests.report.pages import HOSTILE, made_evaluation, made_records


class Parsed(HTMLParser):
    """A parsed page: elements with their attributes, and the text of scripts and styles."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": []}
        self._open: str | None = None
        self.feed(file.read_text(errors="surrogateescape"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.texts:
            self._open = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = None if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts[self._open][-1] += data


def content_of(file: Path) -> dict[str, Any]:
    """What a page shows, read as a browser would."""
    content: dict[str, Any] = json.loads(Parsed(file).texts["script"][0])
    return content


def picture_of(address: str) -> Image.Image:
    assert address.startswith("data:image/jpeg;base64,")
    return Image.open(BytesIO(base64.b64decode(address.partition(",")[2])), formats=["JPEG"])


# The file


def test_names_cannot_inject_html(tmp_path: Path) -> None:
    """Class names, paths and the title with markup, quotes and our own placeholders."""
    plain = made_evaluation(tmp_path / "plain", CLASSES, 6)
    write_page(tmp_path / "plain.html", "plain", evaluation_content(plain, None, None, {}))
    names = ["<img src=x onerror=alert(3)>.jpg", "a'b\"c,d.jpg", "@CONTENT@\u2028.jpg"]
    evaluation = made_evaluation(tmp_path / "hostile", HOSTILE, 6, names=names)
    write_page(tmp_path / "hostile.html", HOSTILE[0], evaluation_content(evaluation, None, None, {}))
    before, after = Parsed(tmp_path / "plain.html"), Parsed(tmp_path / "hostile.html")
    assert after.elements == before.elements
    assert after.texts["style"] == before.texts["style"] and after.texts["script"][1:] == before.texts["script"][1:]
    assert after.texts["title"] == [HOSTILE[0]]
    content = content_of(tmp_path / "hostile.html")
    assert content["classes"] == list(HOSTILE)
    assert set(names) <= set(content["images"]["path"])


def test_file_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    """A byte that is not UTF-8 stays the surrogate that Python uses, and the script converts it back."""
    evaluation = made_evaluation(tmp_path / "odd", CLASSES, 3, names=["\udcff.jpg"])
    write_page(tmp_path / "odd.html", "odd", evaluation_content(evaluation, None, None, {}))
    assert "\udcff.jpg" in content_of(tmp_path / "odd.html")["images"]["path"]


def test_policy_allows_only_this_script_and_style(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "page", {"classes": []})
    page = Parsed(tmp_path / "page.html")
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy") or ""
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("script-src", page.texts["script"][1]), ("style-src", page.texts["style"][0]))
    }
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        **{name: f"'sha256-{value}'" for name, value in hashes.items()},
    }


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """No address but within the page, no import in the style, nothing in the script that asks the network."""
    evaluation = made_evaluation(tmp_path / "plain", CLASSES, 6)
    write_page(tmp_path / "page.html", "page", evaluation_content(evaluation, None, None, {}))
    page = Parsed(tmp_path / "page.html")
    addresses = [a[name] or "" for _, a in page.elements for name in ("src", "href", "action") if name in a]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\(|@import", page.texts["style"][0])
    script = page.texts["script"][1]
    assert not re.search(
        r"fetch|XMLHttpRequest|WebSocket|import\(|innerHTML|outerHTML|insertAdjacentHTML|\beval\(", script
    )
    assert set(re.findall(r"https?://[^\"]+", script)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


# What it shows


def test_records_are_equal_after_saving_and_loading(tmp_path: Path) -> None:
    """predictions.csv holds every bit of the records."""
    evaluation = made_evaluation(tmp_path / "a", ("x", "y\nz", "ä,b", "c", "d", "e", "f"), 40)
    wanted = made_records(np.arange(40) % 7, 7)
    for name in ("target", "loss", "classes", "probabilities"):
        assert np.array_equal(getattr(evaluation.records, name), getattr(wanted, name)), name


def test_matrix_and_class_metrics_equal_scikit_learn(tmp_path: Path) -> None:
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 60)
    content = evaluation_content(evaluation, None, None, {})
    records = evaluation.records
    counts = confusion_matrix(records.target, records.prediction)
    assert {(t, p): n for t, p, n in content["confusion"]} == {
        (t, p): counts[t, p] for t in range(3) for p in range(3) if counts[t, p]
    }
    scores = precision_recall_fscore_support(records.target, records.prediction)
    for number, row in enumerate(content["class_rows"]):
        assert row[:2] == [CLASSES[number], 20]
        assert row[2:5] == pytest.approx([score[number] for score in scores[:3]], abs=1e-4)
        others = {CLASSES[p]: n for p, n in enumerate(counts[number]) if p != number}
        name, _, number_of = row[5].rstrip(")").partition(" (")
        assert others[name] == int(number_of) == max(others.values())
    images = content["images"]
    cells = Counter(zip(images["target"], images["prediction"], strict=True))
    assert all(cells[t, p] == n for t, p, n in content["confusion"])


def test_top_losses_are_the_highest_losses(tmp_path: Path) -> None:
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 60)
    content = evaluation_content(evaluation, None, None, {})
    shown = [content["images"]["path"][row] for row in content["top_losses"]]
    wanted = sorted(range(60), key=lambda i: -evaluation.records.loss[i])[:24]
    assert shown == [evaluation.paths[i] for i in wanted]


def test_pictures_are_small_and_within_the_size_limit(tmp_path: Path) -> None:
    write_image(tmp_path / "wide.png", seed=1, size=(400, 100))
    write_image(tmp_path / "tiny.png", seed=2, size=(20, 10))
    files = [tmp_path / name for name in ("wide.png", "gone.png", "tiny.png")]
    wide, gone, tiny = pictures(files, {})
    assert picture_of(wide).size == (128, 32) and picture_of(tiny).size == (20, 10) and gone == ""
    same = np.asarray(picture_of(tiny)).astype(float) - np.asarray(Image.open(tmp_path / "tiny.png"))
    assert abs(same.mean()) < 4
    many = pictures([tmp_path / "tiny.png"] * 200, {}, room=10 * len(tiny))
    assert many == [tiny] * 10 + [""] * 190


def test_with_little_space_only_mistakes_have_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 300)
    asked: list[Path] = []
    monkeypatch.setattr(page_content, "pictures", lambda files, _: asked.extend(files) or [""] * len(files))
    evaluation_content(evaluation, None, None, {})
    order = [file.name for file in asked]
    assert len(order) == len(set(order)) == 300
    worst = sorted(range(300), key=lambda i: -evaluation.records.loss[i])[:24]
    assert order[:24] == [evaluation.paths[i] for i in worst]
    place = {path: number for number, path in enumerate(order)}
    wrong = evaluation.records.prediction != evaluation.records.target
    mistakes = [place[path] for path, bad in zip(evaluation.paths, wrong, strict=True) if bad]
    cells = 9 * page_content.PER_CELL  # a few of every cell come before the rest of the mistakes
    assert max(mistakes) < len(mistakes) + page_content.MOST_JUDGED and np.median(mistakes) < len(mistakes) + cells


def test_more_images_than_can_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst are listed, mistakes first; the counts are still of all."""
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 60)
    monkeypatch.setattr(page_content, "MOST_LISTED", 30)
    content = evaluation_content(evaluation, None, None, {})
    assert content["listed"] == len(content["images"]["path"]) == 30
    assert sum(count for *_, count in content["confusion"]) == 60
    assert "30 of 60 images with the highest losses" in content["images_note"]
    wrong = int((evaluation.records.prediction != evaluation.records.target).sum())
    listed_wrong = sum(
        t != p for t, p in zip(content["images"]["target"], content["images"]["prediction"], strict=True)
    )
    assert listed_wrong == wrong <= 30


def test_matrix_of_many_classes_shows_those_with_mistakes(tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(130))
    evaluation = made_evaluation(tmp_path / "a", classes, 260, side=8)
    content = evaluation_content(evaluation, None, None, {})
    assert len(content["matrix"]) == 120 and content["matrix"] == sorted(content["matrix"])
    mistakes = Counter(c for t, p, n in content["confusion"] if t != p for c in (t, p) for _ in range(n))
    assert min(mistakes[c] for c in content["matrix"]) >= max(
        mistakes[c] for c in set(range(130)) - set(content["matrix"])
    )
    records = evaluation.records
    outside = ~(np.isin(records.target, content["matrix"]) & np.isin(records.prediction, content["matrix"]))
    assert "has the 120 of 130 classes with the most mistakes. The other 10 classes" in content["matrix_note"]
    assert f"{outside.sum()} of 260 images" in content["matrix_note"]


def test_matrix_of_102_classes_is_complete(tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(102))
    content = evaluation_content(made_evaluation(tmp_path / "a", classes, 102, side=8), None, None, {})
    assert content["matrix"] == list(range(102)) and content["matrix_note"] == ""


def test_missing_or_foreign_evaluation_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "not a run folder" in refused(2, "report", tmp_path)
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 6)
    with pytest.raises(
        ArtifactError, match=r"predictions\.csv: damaged, or from another run \('cat' is missing or unknown\)"
    ):
        read_evaluation(tmp_path / "a" / "eval", evaluation.root, "val", ("x", "y", "z"), evaluation.spec)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_evaluation(tmp_path / "none", evaluation.root, "val", CLASSES, evaluation.spec)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.json", "{", "metrics.json: damaged, not JSON"),
        ("metrics.json", "[1]", "metrics.json: damaged, not a JSON object"),
        ("metrics.json", "{}", "metrics.json: damaged, or from another run ('intervals' is missing"),
        ("embeddings.npy", "no array", "embeddings.npy: damaged"),
    ],
)
def test_damaged_evaluation_gives_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 6)
    folder = tmp_path / "a" / "eval"
    (folder / name).write_text(text)
    with pytest.raises(ArtifactError, match=re.escape(said)):
        read_evaluation(folder, evaluation.root, "val", CLASSES, evaluation.spec)


def test_labels_of_training_images_are_not_judged(tmp_path: Path) -> None:
    evaluation = replace(made_evaluation(tmp_path / "a", CLASSES, 6), split="train")
    (judged,) = evaluation_content(evaluation, None, None, {})["label_errors"]
    assert judged["rows"] == [] and "learned these labels" in judged["note"]


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with one image in both train and val, and its data in the same folder.

    The check for near duplicates decodes every image; the report must not decode one again.
    """
    place = tmp_path_factory.mktemp("report")
    data = make_folder(place / "data")
    shutil.copy(data / "train" / "cat" / "train000.png", data / "val" / "cat" / "copy.png")
    options = [*WITH_REPORT, "-b", "8", "--epochs", "2", "--recipe", "discriminative"]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((report_pictures, "decode"), (data_pictures, "decoded")):
            patch.setattr(module, name, lambda file: pytest.fail(f"{file} is decoded again"))
        assert main(["train", str(data), "-o", str(place / "run"), *options]) == 0
    return place / "run"


def test_a_run_ends_with_its_page(run: Path) -> None:
    content = content_of(run / "report.html")
    assert {chart["title"] for chart in content["curves"]} == {"Loss", "Top-1 accuracy", "Macro F1", "Learning rate"}
    loss = next(chart for chart in content["curves"] if chart["title"] == "Loss")
    assert [series["name"] for series in loss["series"]] == ["train", "val"]
    assert [[x for x, _ in series["points"]] for series in loss["series"]] == [[1, 2], [1, 2]]
    assert loss["phases"] == [1.5]
    assert len(content["overlays"]) == min(24, 16) and len(content["top_losses"]) == 16
    assert all(picture_of(address).size == (16, 16) for address in content["overlays"].values())
    assert ["status", "done"] in content["facts"]
    started = json.loads((run / "run.json").read_text())["launches"][0]["started"]
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(started) < timedelta(hours=1)
    about = f"resnet18, recipe discriminative, data data, {started[:10]}"
    assert content["about"][0] == f"{about}."
    assert about.replace("-", "\\-") in (run / "README.md").read_text()
    assert [row[6] for row in content["class_rows"]] == [8, 8, 8]
    assert ["images in train", "24 of 3 classes, 8 to 8 each"] in content["data"]
    assert ["short side", "20 to 20 pixels, median 20"] in content["data"]
    (pair,) = content["near_duplicates"]
    assert {content["images"]["path"][row] for row in pair} == {"train/cat/train000.png", "val/cat/copy.png"}
    assert "1 of them across splits" in content["duplicates_note"]


def test_report_decodes_every_image_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once if the cache of findings is empty, and at most once if it is full."""
    counts: Counter[str] = Counter()

    def counted(source: Any) -> AbstractContextManager[predict.OpenFile]:
        counts[str(source)] += isinstance(source, Path)  # a file that is open already is not opened again
        return original(source)

    original = predict.file_of
    for module in (predict, check):
        monkeypatch.setattr(module, "file_of", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["report", str(run)]) == 0
    decoded = [count for count in counts.values() if count]
    assert decoded == [1] * (24 + 16)
    counts.clear()
    assert main(["report", str(run)]) == 0
    assert max(counts.values()) == 1


def test_page_written_again_is_the_same(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = content_of(run / "report.html")
    assert main(["report", str(run)]) == 0
    after = content_of(run / "report.html")
    for name in set(before) - {"facts"}:  # run.json knows more by now
        assert after[name] == before[name], name
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["report", str(copy), "--no-near-duplicates"]) == 0
    assert content_of(copy / "report.html")["near_duplicates"] == []


def test_run_without_a_report_gets_the_same_report_later(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = [*WITH_REPORT, "-b", "8", "--epochs", "2", "--recipe", "discriminative", "--no-report"]
    late = tmp_path / "run"
    assert main(["train", str(run.parent / "data"), "-o", str(late), *options]) == 0
    assert not list(late.glob("plots/*")) and not (late / "report.html").exists()
    assert main(["report", str(late)]) == 0
    before, after = content_of(run / "report.html"), content_of(late / "report.html")
    for name in set(before) - {"facts", "texts"}:  # which hold the time and this very setting
        assert str(after[name]).replace(str(late), str(run)) == str(before[name]), name
    drawn = {file.name for file in (run / "plots").iterdir()} - {"samples_train.png"}
    assert {file.name for file in (late / "plots").iterdir()} == drawn
    for name in ("confusion_matrix.png", "reliability.png", "predictions.png"):
        assert (late / "plots" / name).read_bytes() == (run / "plots" / name).read_bytes()


def test_eval_writes_a_page_too(run: Path, tmp_path: Path) -> None:
    """Of other data, with a map of the embeddings if they are there."""
    data = make_folder(tmp_path / "more", val=0)
    options = ["-o", str(tmp_path / "out"), "--workers", "0", "--threads", "1", "--embeddings"]
    assert main(["eval", str(run), str(data), *options]) == 0
    content = content_of(tmp_path / "out" / "report.html")
    assert content["about"][0].endswith(f"best.safetensors, data more, {datetime.now(UTC).date()}.")
    assert content["listed"] == 24 and content["near_duplicates"] is None and content["curves"] == []
    assert len(content["map"]) == 24 and {int(row) for row, *_ in content["map"]} == set(range(24))
    assert len(content["overlays"]) == 24


def test_damaged_run_gives_one_line(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text('{"step": 1, "lr"')
    assert "metrics.jsonl: damaged" in refused(6, "report", copy, "--no-near-duplicates")
    shutil.copy(run / "metrics.jsonl", copy)
    (copy / "label_errors.csv").write_text("path,label,likely,quality,suspected\na.png,cat,cow,0.5,1\n")
    assert "label_errors.csv: damaged, or from another run ('cow'" in refused(6, "report", copy, "--no-near-duplicates")


def test_missing_images_are_listed_without_pictures(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    facts = json.loads((run / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(facts | {"data_root": str(tmp_path / "gone")}))
    assert "gone: the images of this run no longer exist" in refused(3, "report", copy)
    assert main(["report", str(copy), "--no-near-duplicates"]) == 0
    content = content_of(copy / "report.html")
    assert content["images"]["picture"] == [""] * 16 and content["overlays"] == {}


def test_findings_that_look_alike_within_a_split(tmp_path: Path) -> None:
    """Pairs of evaluated images only are not of training images, and are left out."""
    evaluation = made_evaluation(tmp_path / "a", CLASSES, 3)
    shutil.copy(evaluation.root / "00000.jpg", evaluation.root / "again.jpg")
    images = page_content.Images(evaluation.root)
    for split, wanted in (("train", 1), ("val", 0)):
        findings = [look(evaluation.root, name, "cat", split, full=True) for name in ("00000.jpg", "again.jpg")]
        data = summary(report_on(findings), Preprocessing())
        rows, note = page_content._near_duplicates(data, images, CLASSES)
        assert len(rows) == wanted and note.startswith({1: "1 pair of", 0: "0 pairs of"}[wanted])
