"""Compare techniques: train several recipes on the same data, and say which differences are significant."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resnet_dist.config.fields import out_of_range, required
from resnet_dist.config.layers import convert, from_keywords, keyword_signature
from resnet_dist.config.schema import DataConfig, TrainConfig
from resnet_dist.config.stored import Layer, kept, read_toml, stored_config
from resnet_dist.errors import MachineError, NonFiniteError, UsageError, python_errors
from resnet_dist.training.result import Run
from resnet_dist.training.run import as_call, run_training

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.report.compare import Comparison, FinishedRun
    from resnet_dist.runtime.display import Display

SIX = (
    "feature-extractor",
    "feature-extractor-bn-eval",
    "bn-only",
    "discriminative",
    "discriminative-bn-frozen",
    "deep-head",
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainConfig):
    """Train several recipes on the same data, or take finished runs, and test which differences are real.

    Takes every option of train and applies it to all recipes. Each run goes into --output-dir, as <recipe>/seed-<n>;
    compare.md, compare.csv, compare.json and compare.png are written there too. The same command again continues
    where it was interrupted.
    """

    REFUSED: ClassVar = ("recipe", "resume", "overwrite")  # options of train without a meaning here
    HELP: ClassVar = {"output_dir": "The folder for the runs and the comparison (default: runs/compare-<data>)."}

    recipes: tuple[str, ...] = SIX
    """The recipes to compare."""
    seeds: int = 1
    """Runs of each recipe, with the seeds --seed, --seed + 1 and so on."""
    runs: tuple[str, ...] = ()
    """Folders of finished runs to compare too; without DATA, only these are compared."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        data_is_needed = next(DataConfig().problems()) if self.runs else None
        yield from (problem for problem in super().problems() if problem != data_is_needed)
        yield from out_of_range(self, 1, 1000, "seeds")
        if not self.runs and not self.recipes:
            yield "--recipes is empty: name at least one, or --runs"
        if self.run.overwrite:
            yield "--overwrite belongs to train: compare replaces nothing, choose another --output-dir"
        if self.data.data is None and self.run.output_dir is None:
            yield "--output-dir is missing: without DATA there is no name for the comparison"


def compare(
    data: str | os.PathLike[str] | None = None, *, verbose: bool = False, **settings: Any
) -> "Comparison | None":
    """Train several recipes on the same data, and say which differences between them are real.

    `compare("photos", recipes=["feature-extractor", "discriminative"], seeds=3, epochs=10)`: the keywords are the
    options of `resnet-dist compare`. The same call again continues where it was interrupted. With `runs=[...]`, folders
    of finished runs (or Runs) are compared too; without `data`, only these. Returns None with `dry_run=True`. In a
    launch of several processes every process must call this. Raises UsageError, DataError, MachineError, ArtifactError,
    Preempted, or, after the comparison of the others is written, NonFiniteError if a run diverged.
    """
    given = {"data": data, **settings}
    with python_errors():
        configs = configs_of(given, lambda one: from_keywords(CompareConfig, one))
        return run_comparison(configs, verbose=verbose, command=as_call("compare", given))


compare.__signature__ = keyword_signature(CompareConfig, verbose=False)  # type: ignore[attr-defined]


def configs_of(given: Mapping[str, Any], make: Callable[[Mapping[str, Any]], "CompareConfig"]) -> list["CompareConfig"]:
    """A config for each recipe, all with the same other settings; one without a recipe to compare only finished runs.

    `make` makes the config of one recipe. Raises UsageError with every problem of every recipe.
    """
    if given.get("recipe") is not None:
        raise UsageError(f"--recipe: compare takes --recipes {given['recipe']}")
    if given.get("resume") is not None:
        raise UsageError("--resume belongs to train: the same compare command goes on by itself")
    names = given.get("recipes")
    names = SIX if names is None else convert(tuple[str, ...], names if isinstance(names, str) else list(names))
    configs: list[CompareConfig] = []
    problems: dict[str, None] = {}
    for name in dict.fromkeys(names):
        try:
            configs.append(make({**given, "recipe": name}))
        except UsageError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UsageError(list(problems))
    return configs or [make(given)]


def run_comparison(
    configs: Sequence[CompareConfig], *, verbose: bool = True, command: str | None = None
) -> "Comparison | None":
    """Train what is not trained yet, compare and write; with `verbose`, print. Returns None on a dry run.

    Raises ResnetDistError: NonFiniteError, after the comparison of the others, if a run diverged.
    """
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.runtime.display import Display
    from resnet_dist.runtime.isolation import process_settings_restored

    cfg = configs[0]
    folder = Path(cfg.run.output_dir or f"runs/compare-{Path(cfg.data.data or '').stem}")
    if cfg.run.dry_run:
        for config in configs:
            run_training(training(config, 0, folder), verbose=verbose)
        return None
    with process_settings_restored():
        accelerator, _ = start(cfg.system)
        display = Display(accelerator.is_main_process, verbose)
        trainings = (
            [] if cfg.data.data is None else [training(c, seed, folder) for c in configs for seed in range(c.seeds)]
        )
        others = [Path(run) for run in cfg.runs]
        planned = [Path(required(single.run.output_dir, "--output-dir")) for single in trainings]
        on_main(accelerator, lambda: check_distinct([*planned, *others]))
        on_main(accelerator, lambda: prepare(folder, configs if trainings else [], others))
        done, diverged = _train_all(accelerator, trainings, display, verbose, command)
        comparison = on_main(accelerator, lambda: conclude(folder, done, others))
    if comparison is not None:
        written = f"written: {folder / 'compare.md'}, compare.csv, compare.json, compare.png"
        for line in ("", *comparison.lines(), "", written):
            display.say(line)
    if diverged:
        raise NonFiniteError("; ".join(diverged))
    return comparison


def _train_all(
    accelerator: "Accelerator",
    trainings: Sequence[TrainConfig],
    display: "Display",
    verbose: bool,
    command: str | None,
) -> tuple[dict[str, list[Run]], list[str]]:
    """Train one after the other; returns the runs of each recipe, and a line for each run that diverged."""
    done: dict[str, list[Run]] = {}
    diverged = []
    for number, cfg in enumerate(trainings, 1):
        single = as_begun(accelerator, cfg)
        display.say(f"\ncompare {number}/{len(trainings)}: {single.recipe}, seed {single.run.seed}")
        try:
            run = run_training(single, verbose=verbose, command=command)
        except NonFiniteError as error:
            diverged.append(f"{single.run.output_dir} is left out: {error}")
        else:
            done.setdefault(str(single.recipe), []).extend([run] if run is not None else [])
    return done, diverged


def training(cfg: CompareConfig, number: int, folder: Path) -> TrainConfig:
    """The `train` config of one run: its own folder, its seed, and `resume` if the run has started."""
    seed = cfg.run.seed + number
    run = dataclasses.replace(
        cfg.run, seed=seed, output_dir=str(folder / str(cfg.recipe) / f"seed-{seed}"), resume="auto"
    )
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{**fields, "run": run})


def as_begun(accelerator: "Accelerator", cfg: TrainConfig) -> TrainConfig:
    """The config with the random stream of the run in its folder, if there is one: an older version may have started
    it.
    """
    from resnet_dist.runtime.accelerate import on_main

    where = {"resume": "auto", "output_dir": cfg.run.output_dir}
    stored = on_main(accelerator, lambda: stored_config(where).get("run"))
    stream = stored.get("random_stream") if isinstance(stored, dict) else None
    if not isinstance(stream, int) or cfg.run.random_stream is not None:
        return cfg
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, random_stream=stream))


def check_distinct(runs: Sequence[Path]) -> None:
    """Raise UsageError if a run folder is named twice, even in two spellings: it would count as two seeds."""
    first: dict[Path, Path] = {}
    for run in runs:
        other = first.setdefault(run.resolve(), run)
        if other is not run:
            raise UsageError(f"--runs {run}: the same run as {other}, which would count twice; name it once")


def prepare(folder: Path, configs: Sequence[CompareConfig], others: Sequence[Path]) -> None:
    """Create the folder. Check that earlier runs in it had the same options, and that given runs are done.

    The options are stored in <recipe>/asked.toml. Raises UsageError, ArtifactError, MachineError.
    """
    import tomli_w

    from resnet_dist.files.outputs import check_folder
    from resnet_dist.files.run import write_atomically
    from resnet_dist.report.compare import COMPARISON, read_run

    for path in others:
        read_run(path)
    if not any(folder.glob("*/asked.toml")):  # of a comparison that has not come to its end
        check_folder(folder, COMPARISON)
    try:
        for place in (folder, *(folder / str(config.recipe) for config in configs)):
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be created ({error.strerror})") from None
    for config in configs:
        file, asked = folder / str(config.recipe) / "asked.toml", asked_for(config)
        changed = differences(read_toml(file), asked) if file.exists() else []
        if changed:
            raise UsageError(
                f"{folder}: {config.recipe} was begun there with other options ({', '.join(changed)}); "
                "choose another --output-dir"
            )
        write_atomically(file, tomli_w.dumps(asked))


def differences(before: Layer, after: Layer) -> list[str]:
    """The settings of two stored configs that differ, each as `name old -> new`."""
    flat = [_flat(before), _flat(after)]
    names = [name for name in flat[0] | flat[1] if flat[0].get(name) != flat[1].get(name)]
    return [f"{name} {flat[0].get(name, 'automatic')} -> {flat[1].get(name, 'automatic')}" for name in names]


def _flat(config: Layer) -> Layer:
    flat: Layer = {}
    for name, value in config.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def asked_for(cfg: CompareConfig) -> Layer:
    """The settings that decide the result of a recipe's runs, apart from the seed."""
    values = kept(training(cfg, 0, Path()))
    values["run"] = {name: value for name, value in values["run"].items() if name != "seed"}
    values["data"] = {name: value for name, value in values["data"].items() if name != "workers"}
    return {name: value for name, value in values.items() if name != "system"}


def conclude(folder: Path, trained: Mapping[str, Sequence[Run]], others: Sequence[Path]) -> "Comparison | None":
    """Compare and write. On the main process. None if every run diverged. Raises UsageError, ArtifactError."""
    from resnet_dist.report.compare import by_settings, compared, read_run, write_comparison

    groups: dict[str, list[FinishedRun]] = {
        name: [read_run(run.path) for run in runs] for name, runs in trained.items()
    }
    groups |= by_settings([read_run(path) for path in others])
    if not groups:
        return None
    comparison = compared(folder, groups)
    write_comparison(comparison, groups)
    return comparison
