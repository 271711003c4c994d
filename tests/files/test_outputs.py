"""What may be written where: runs are known by their content, and nothing that is not ours is removed or replaced."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resnet_dist.cli.main import main
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.outputs import Kind, check_file, check_folder, json_with, make_folder, table_with
from resnet_dist.files.run import RunFolder, has_state, is_run, read_facts, written_in
from resnet_dist.training import demo
from resnet_dist.training.state import State, newest_state, remove_leftovers, write_state
from tests.conftest import TINY, WITH_REPORT, small_disk, write_image
from tests.conftest import make_folder as images_in

Refused = Callable[..., str]
FACTS = {
    "status": "done",
    "epochs": 1,
    "data_root": "/data",
    "classes": 2,
    "images": {"train": 6, "val": 4, "test": 0},
}
BEGUN = {**FACTS, "status": "running"}


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with what every verb writes into it; not to be changed by a test."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(folder), *WITH_REPORT, "--epochs", "1", "-b", "8", "-o", str(run)]) == 0
    for words in (
        ["eval", "--calibrate"],
        ["eval", "--split", "train", "--embeddings"],
        ["explain", "--worst", "2"],
        ["export", "--embeddings"],
        ["hub", "--license", "mit"],
        ["report", "--no-near-duplicates"],
    ):
        threads = ["--threads", "1"] if words[0] in ("eval", "explain", "export") else []
        assert main([words[0], str(run), *words[1:], *threads]) == 0, words
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it; its large files are the same ones, so they may be removed but not written to."""

    def copy(source: str, to: str) -> None:
        os.link(source, to) if Path(source).stat().st_size > 1 << 20 else shutil.copy2(source, to)

    return shutil.copytree(finished, tmp_path / "run", copy_function=copy)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def plant(run: Path) -> dict[str, bytes]:
    """Files of somebody else at every level, under names that look like ours; what they hold."""
    names = ["notes.txt", "thesis/draft.txt", "thesis/run.json", "checkpoints/mine.pth", "plots/curves.svg"]
    names += ["eval/val/notes.md", "export/Dockerfile", "data/train/a.jpg", "checkpoints/step-notes/a.txt", ".tmp-x"]
    names += ["checkpoints/step-000000003/mine.txt", "explain/gradcam/cover.png", "thesis/.tmp-1-run.json"]
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"mine: {name}")
    return {name: (run / name).read_bytes() for name in names}


# Which folder is a run


@pytest.mark.parametrize(
    "facts",
    [
        {"name": "my web app"},
        {**FACTS, "status": "published"},
        {**FACTS, "images": 10},
        {**FACTS, "images": {"train": 6}},
        {name: value for name, value in FACTS.items() if name != "epochs"},
        {name: value for name, value in FACTS.items() if name != "data_root"},
        [FACTS],
    ],
)
def test_a_folder_with_another_run_json_is_not_a_run(tmp_path: Path, facts: object) -> None:
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "draft.txt").write_text("mine")
    before = contents(tmp_path)
    assert not is_run(tmp_path)
    for replace in ("nothing", "unfinished", "any"):
        with pytest.raises(UsageError, match="it exists and is not a run"):
            RunFolder(tmp_path).create(replace, 0, BEGUN)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


def test_a_link_to_the_run_json_of_a_run_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps(FACTS))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").symlink_to(tmp_path / "real.json")
    assert not is_run(tmp_path / "run")


def test_a_folder_that_is_not_a_run_is_refused_on_the_command_line(
    folder: Path, tmp_path: Path, refused: Refused
) -> None:
    """Nothing is made in it, not even a lock."""
    place = tmp_path / "webapp"
    place.mkdir()
    (place / "run.json").write_text('{"name": "my web app"}')
    for options in (["-o", place, "--overwrite"], ["-o", place, "--resume", "auto"], ["-o", place]):
        assert "it exists and is not a run" in refused(2, "train", folder, *TINY, *options)
    (place / "config.toml").write_text("")
    assert "its run.json is not that of a run" in refused(2, "train", folder, *TINY, "--resume", place)
    assert sorted(contents(place)) == ["config.toml", "run.json"]


# What is removed


def test_the_program_knows_every_file_that_it_writes(finished: Path) -> None:
    """So that a run that is replaced leaves nothing behind; a verb that writes another file must name it."""
    ours = {str(file.relative_to(finished)) for file in written_in(finished)}
    assert contents(finished).keys() - ours == {".lock"}


def test_overwriting_removes_only_what_the_program_wrote(run: Path) -> None:
    mine = plant(run)
    RunFolder(run).create("any", 0, BEGUN)
    left = contents(run)
    assert left.keys() - mine.keys() == {"run.json", ".lock"}
    assert {name: left[name] for name in mine} == mine
    assert read_facts(run) == BEGUN
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == sorted(
        {name.split("/")[0] for name in mine if "/" in name} | {"checkpoints", "plots", "data"}
    )


def test_overwriting_follows_no_link(run: Path, tmp_path: Path) -> None:
    """A link to a folder, and one under the name of a file of ours: both stay, and so does what they lead to."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "predictions.csv").write_text("mine")
    (run / "eval/test").symlink_to(outside)
    (run / "label_errors.csv").symlink_to(outside / "predictions.csv")
    RunFolder(run).create("any", 0, BEGUN)
    assert contents(outside) == {"predictions.csv": b"mine"}
    assert (run / "eval/test").is_symlink() and (run / "label_errors.csv").is_symlink()


@pytest.mark.parametrize("name", ["checkpoints", "plots", "data", "eval", "eval/val", "tracker"])
def test_training_writes_through_no_link(tmp_path: Path, name: str) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (run / name).parent.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(FACTS))
    (run / name).symlink_to(outside)
    with pytest.raises(UsageError, match=f"{run / name}: symbolic links are not allowed"):
        RunFolder(run).create("any", 0, BEGUN)
    assert read_facts(run) == FACTS and not any(outside.iterdir())


def test_files_are_not_written_through_links(tmp_path: Path) -> None:
    """run.json, a log, the lock, and the unfinished form of a file under a name that can be foreseen."""
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    for name in ("run.json", "metrics.jsonl", f".tmp-{os.getpid()}-config.toml"):
        (tmp_path / name).symlink_to(outside)
    run = RunFolder(tmp_path)
    run.write("run.json", "{}")
    run.write("config.toml", "")
    run.append_step({"step": 1})
    assert outside.read_text() == "mine" and (tmp_path / "run.json").read_text() == "{}"
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MachineError, match="cannot be written"):
        run.lock()
    assert not (tmp_path / "nowhere").exists()


def test_a_checkpoint_that_makes_room_leaves_the_files_of_others(tmp_path: Path) -> None:
    """Also if a step is saved repeatedly next to them; the folders that remain because of them are not states."""
    run, folder = tmp_path, tmp_path / "checkpoints"
    for name in ("step-000000001/notes.txt", "step-mine/state.json", "step-000000002.replaced/mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    assert newest_state(folder) is None and not has_state(run)
    for steps in (1, 2, 2, 3):
        write_state(folder, {"x": torch.ones(2)}, {"state": State(steps_done=steps).to_dict()}, keep=1)
        newest = newest_state(folder)
        assert newest is not None and newest.name == f"step-{steps:09d}" and has_state(run)
        (newest / "mine.txt").write_text("mine")
    ours = {f"checkpoints/step-000000003/{name}" for name in ("state.safetensors", "state.json", "manifest.json")}
    found = contents(run)
    assert ours == found.keys() - {name for name, content in found.items() if content == b"mine"}
    assert sum(content == b"mine" for content in found.values()) == 7
    for name in ours:
        (run / name).unlink()
    assert newest_state(folder) is None and not has_state(run)


def test_leftovers_are_files_that_the_program_writes(tmp_path: Path) -> None:
    """What somebody else put under such a name stays, and a state in its place fails without removing it."""
    ours = [".tmp-7-run.json", "checkpoints/.tmp-7-best.safetensors", "checkpoints/.tmp-7/state.json"]
    mine = [".tmp-7/a", ".tmp-7-b", "checkpoints/.tmp-8/state/a", "checkpoints/.tmp-7-x/state.json", ".tmp-mine/a"]
    mine += ["checkpoints/.tmp-8/a", f"checkpoints/.tmp-{os.getpid()}/a"]
    for name in (*ours, *mine, "checkpoints/.tmp-8/state.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert contents(tmp_path).keys() == set(mine) and not (tmp_path / "checkpoints/.tmp-7").exists()
    with pytest.raises(MachineError, match="cannot be written \\(File exists\\)"):
        write_state(tmp_path / "checkpoints", {}, {"state": State().to_dict()}, keep=1)
    assert contents(tmp_path).keys() == set(mine)


# Which run may be replaced


@pytest.mark.parametrize(
    ("status", "replace", "said"),
    [
        ("done", "nothing", "it contains a finished run; choose another folder, or give --overwrite"),
        ("done", "unfinished", "it contains a finished run"),
        ("done", "any", None),
        ("running", "nothing", "it contains a run"),
        ("running", "unfinished", None),
        ("failed", "unfinished", None),
        ("preempted", "any", None),
    ],
)
def test_a_finished_run_is_only_replaced_if_that_is_asked_for(
    tmp_path: Path, status: str, replace: str, said: str | None
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**FACTS, "status": status}))
    if said is None:
        RunFolder(tmp_path).create(replace, 0, BEGUN)  # type: ignore[arg-type]
        assert read_facts(tmp_path) == BEGUN
    else:
        with pytest.raises(UsageError, match=said):
            RunFolder(tmp_path).create(replace, 0, BEGUN)  # type: ignore[arg-type]
        assert read_facts(tmp_path)["status"] == status


def test_resume_auto_keeps_a_finished_run_without_states(
    run: Path, folder: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    for state in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(state)
    before = contents(run)
    arguments = ["train", str(folder), *TINY, "-b", "8", "--seed", "7", "--resume", "auto", "-o", str(run)]
    assert main(arguments) == 0
    assert "this run is complete after 1 epoch; to train more, give --epochs above 1" in capsys.readouterr().out
    for more in (arguments, ["train", "--resume", str(run)]):
        said = refused(2, *more, "--epochs", "2")
        assert "complete after 1 epoch and has no checkpoint" in said and said.count("\n") == 1
    assert contents(run) == before


# Space


def test_a_run_without_space_makes_and_removes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that the old run gives back counts; a folder that an earlier version left half made is free."""
    usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before, held = contents(run), sum(file.stat().st_size for file in written_in(run))
    with pytest.raises(MachineError, match="MiB free"):
        RunFolder(run).create("any", held + 1001, BEGUN)
    assert contents(run) == before
    RunFolder(run).create("any", held + 999, BEGUN)
    with pytest.raises(MachineError, match="MiB free"):
        RunFolder(tmp_path / "new").create("nothing", 1001, BEGUN)
    assert not (tmp_path / "new").exists()
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    (tmp_path / "new/.lock").touch()
    RunFolder(tmp_path / "new").create("nothing", 0, BEGUN)
    assert read_facts(tmp_path / "new") == BEGUN


# From elsewhere


def test_resume_and_reproduce_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data of the run is used, although the new working directory has a folder of the same name."""
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(folder, home / "photos")
    (away / "photos").mkdir(parents=True)
    (home / "left-out.txt").write_text("train/cat/train000.png\n")
    monkeypatch.chdir(home)
    options = [*TINY, "--epochs", "1", "-b", "8", "--exclude-list", "left-out.txt", "-o", "run"]
    assert main(["train", "photos", *options]) == 0
    monkeypatch.chdir(away)
    capsys.readouterr()
    assert main(["train", "--resume", str(home / "run"), "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "resuming" in said and "changed: --epochs 1 -> 2" in said and "photos" not in said.partition("run folder")[0]
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "home/run", "--epochs", "3"]) == 0
    assert len((home / "run/metrics.csv").read_text().splitlines()) == 4
    facts = read_facts(home / "run")
    (home / "run/run.json").write_text(json.dumps({name: v for name, v in facts.items() if name != "directory"}))
    text = (home / "run/config.toml").read_text().replace(str(home / "photos"), "photos")
    (home / "run/config.toml").write_text(text)  # as a version that knew of no directory left it
    assert main(["train", "--resume", "home/run", "--dry-run", "--epochs", "4"]) == 0


# Outputs of the other verbs

THING = Kind("a thing", "thing.json", json_with("a", "b"))


def test_a_folder_to_write_into_is_new_empty_or_ours(tmp_path: Path) -> None:
    for name in ("empty", "empties/x/y", "locked", "ours", "foreign", "other", "linked"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("locked/.lock", "locked/.tmp-1-thing.json", "foreign/thesis.tex", "other/notes.txt", "file"):
        (tmp_path / name).touch()
    (tmp_path / "ours/thing.json").write_text('{"a": 1, "b": 2, "c": 3}')
    (tmp_path / "ours/notes.txt").touch()
    (tmp_path / "other/thing.json").write_text('{"a": 1}')
    (tmp_path / "linked/thing.json").symlink_to(tmp_path / "ours/thing.json")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("new/deep", "empty", "empties", "locked", "ours"):
        make_folder(tmp_path / name, THING)
        assert (tmp_path / name).is_dir()
    for name in ("foreign", "other", "linked", "file", "dangling"):
        with pytest.raises(UsageError, match=f"--output-dir {tmp_path / name}: it exists and is not a thing; choose"):
            make_folder(tmp_path / name, THING)
    with pytest.raises(MachineError, match="file is not a writable folder"):
        check_folder(tmp_path / "file/x", THING)


def test_a_file_to_write_is_new_or_ours(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,label\nx,y\n")
    (tmp_path / "other.csv").write_text("path,label,split\nx,y,z\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "table.csv")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere.csv")
    is_ours = table_with("path", "label")
    for name in ("new.csv", "table.csv"):
        check_file(tmp_path / name, is_ours, "--table")
    for name in ("other.csv", "link.csv", "dangling.csv", "."):
        with pytest.raises(UsageError, match="it exists and was not written by this verb"):
            check_file(tmp_path / name, is_ours, "--table")
    with pytest.raises(UsageError, match="does not exist"):
        check_file(tmp_path / "no/x.csv", is_ours, "--table")


OUTPUTS = {
    "train": ["train", "{data}", *TINY, "-o", "{place}"],
    "train --overwrite": ["train", "{data}", *TINY, "--overwrite", "-o", "{place}"],
    "reproduce": ["reproduce", "{run}", "-o", "{place}"],
    "compare": ["compare", "{data}", *TINY, "--recipes", "full-finetune", "-o", "{place}"],
    "lr-find": ["lr-find", "{data}", *TINY, "-o", "{place}"],
    "eval": ["eval", "{run}", "-o", "{place}"],
    "eval of a file": ["eval", "{run}/checkpoints/best.safetensors", "{data}", "-o", "{place}"],
    "explain": ["explain", "{run}", "-o", "{place}"],
    "hub": ["hub", "{run}", "-o", "{place}", "--license", "mit"],
    "export": ["export", "{run}", "-o", "{place}", "--overwrite"],
    "split": ["split", "{data}", "{place}", "--how", "copy"],
    "split to a file": ["split", "{data}", "{file}.csv"],
    "check": ["check", "{data}", "--report", "{file}.json"],
    "bench": ["bench", "--json", "{file}.json"],
    "bench ladder": ["bench", "ladder", "--json", "{file}.json"],
    "bench scaling": ["bench", "scaling", "--json", "{file}.json"],
    "predict": ["predict", "{run}", "{data}/val/cat", "-o", "{file}.csv"],
    "predict --embed": ["predict", "{run}", "{data}/val/cat", "--embed", "{file}.csv"],
    "predict --save-grid": ["predict", "{run}", "{data}/val/cat", "--save-grid", "{file}.png"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_verb_replaces_what_it_did_not_write(
    name: str, finished: Path, folder: Path, tmp_path: Path, refused: Refused
) -> None:
    """A folder or a file of somebody else is refused by its name, before any work, and is afterwards as before."""
    place = tmp_path / "place"
    place.mkdir()
    for file in ("thesis.tex", "file.csv", "file.json", "file.png", "metrics.json", "run.json"):
        (place / file).write_text('{"mine": true}')
    before = contents(tmp_path)
    places = {"data": folder, "run": finished, "place": place, "file": place / "file"}
    said = refused(2, *(word.format(**places) for word in OUTPUTS[name]))
    assert str(place) in said and "exists" in said and said.count("\n") == 1
    assert contents(tmp_path) == before


def test_the_demo_replaces_only_its_own(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    images, run = tmp_path / "digits", tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(FACTS))
    assert "it contains a finished run" in refused(2, "demo", "-o", tmp_path)
    assert not demo.is_of_demo(run, images) and not images.exists()
    (run / "run.json").write_text(json.dumps({**FACTS, "data_root": str(images)}))
    assert demo.is_of_demo(run, images)
    write_image(images / "0/0000.png", seed=1)
    before = contents(images)
    said = refused(2, "demo", "-o", tmp_path)
    assert f"{images / '0/0000.png'}: it exists and is not an image of the demo" in said
    assert contents(images) == before
    (images / "0/0000.png").unlink()
    demo.write_digits(images)
    made = contents(images)
    demo.write_digits(images)
    assert contents(images) == made and len(made) == 1797


@pytest.mark.parametrize(
    ("link", "arguments"),
    [
        ("eval/val", ["eval"]),
        ("eval", ["eval", "--split", "train"]),
        ("explain", ["explain"]),
        ("explain/gradcam", ["explain"]),
        ("export", ["export", "--overwrite"]),
        ("hub", ["hub", "--license", "mit"]),
    ],
)
def test_verbs_write_through_no_link_of_a_run(
    run: Path, tmp_path: Path, refused: Refused, link: str, arguments: list[str]
) -> None:
    """Where it leads stays as it is, though an output of the same verb lies there."""
    (run / link).rename(tmp_path / "outside")
    (run / link).symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    said = refused(2, arguments[0], run, *arguments[1:])
    assert f"{run / link}: symbolic links are not allowed" in said and said.count("\n") == 1
    assert contents(tmp_path / "outside") == before


def test_writing_again_keeps_the_files_of_others(run: Path) -> None:
    """In the folders of eval, explain, export and hub; files of an earlier call are gone."""
    mine = plant(run)
    (run / "explain/gradcam/003-mine.png").write_text("mine")
    (run / "export/test_data_set_0/notes.txt").write_text("mine")
    (run / "export/deploy").mkdir()
    (run / "export/deploy/values.yaml").write_text("mine")
    before = contents(run)
    for words in (["eval"], ["explain", "--worst", "1"], ["export", "--overwrite"]):
        assert main([words[0], str(run), *words[1:], "--threads", "1"]) == 0
    assert main(["hub", str(run), "--license", "mit"]) == 0
    after = contents(run)
    gone = before.keys() - after.keys()
    assert len(gone) == 1 and gone.pop().startswith("explain/gradcam/002-")
    kept = [*mine, "explain/gradcam/003-mine.png", "export/test_data_set_0/notes.txt", "export/deploy/values.yaml"]
    assert all(after[name] == before[name] for name in kept)
    assert not [path for path in run.iterdir() if path.name.startswith((".old", ".tmp-export"))]


def test_split_into_its_own_source_is_refused(tmp_path: Path, refused: Refused) -> None:
    data = images_in(tmp_path / "flat", train=4, val=0)
    (tmp_path / "alias").symlink_to(data)
    for source, out in ((data, data / "out"), (data, data / "cat/out"), (tmp_path / "alias", data / "out")):
        assert "would become a class there" in refused(2, "split", source, out, "--how", "copy")
        assert not out.exists()


# Full disks


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval"],
        ["report", "--no-near-duplicates"],
        ["hub", "--license", "mit"],
        ["explain", "--worst", "1"],
        ["export", "--overwrite"],
    ],
    ids=lambda words: words[0],
)
def test_a_full_disk_is_one_line(
    run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """And with room again the same command is not refused for what it left."""
    for name in ("eval/val", "explain", "hub"):
        if name.startswith(arguments[0]):
            shutil.rmtree(run / name)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(4, arguments[0], run, *arguments[1:])
        assert "cannot be written (No space left on device)" in said and said.count("\n") == 1
    assert main([arguments[0], str(run), *arguments[1:]]) == 0


def test_a_disk_that_is_full_at_any_output_of_training(
    folder: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json says that the run failed and why, and the same command continues, as often as necessary."""
    run = tmp_path / "run"
    arguments = ["train", folder, *WITH_REPORT, "--epochs", "1", "-b", "8", "-o", run, "--resume", "auto"]
    real = os.fsync

    def full_at(name: str) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            if Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith(name):
                full()
            real(descriptor)

        return fsync

    names = ["config.toml", "samples_train.png", "state.json", "predictions.csv", "curves.png", "README.md"]
    for name in (*names, "report.html"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_at(name))
            said = refused(4, *arguments)
        assert "cannot be written (No space left on device)" in said and said.count("\n") == 1, name
        facts = read_facts(run)
        assert (facts["status"], facts["exit_code"]) == ("failed", 4) and facts["reason"] in said, name
    assert main([str(word) for word in arguments]) == 0
    assert read_facts(run)["status"] == "done"


@pytest.mark.parametrize("words", ["-m resnet_dist recipes", "{run}/export/predict.py {run}/export/model.onnx {data}"])
def test_standard_output_that_is_full_is_one_line(finished: Path, folder: Path, words: str) -> None:
    command = [sys.executable, *words.format(run=finished, data=folder / "val/cat").split()]
    with Path("/dev/full").open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    assert "cannot be written (No space left on device)" in done.stderr


@pytest.mark.parametrize("option", ["--output", "--embed", "--save-grid"])
def test_a_full_disk_ends_predict_with_one_line(
    run: Path, folder: Path, tmp_path: Path, refused: Refused, option: str
) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        (disk / "filler").write_bytes(bytes(8 << 10))
        file = disk / f"out{'.png' if option == '--save-grid' else '.csv'}"
        arguments = ["--format", "csv"] if option == "--output" else ["--top-k", "1"]
        images = [folder / "train"] * (8 if option == "--output" else 1)
        model = run / "export/model.onnx"
        said = refused(4, "predict", model, *images, *arguments, option, file).splitlines()
        assert len(said) == 1 and f"{option} {file}: cannot be written (No space left on device)" in said[0]
