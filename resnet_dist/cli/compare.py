"""`resnet-dist compare`: train several techniques on the same data, and say which differences are real."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resnet_dist.cli.parser import typed
from resnet_dist.config.fields import out_of_range
from resnet_dist.config.layers import convert, resolve
from resnet_dist.config.schema import DataConfig, TrainConfig
from resnet_dist.config.stored import Layer, kept, read_toml, stored_config
from resnet_dist.errors import MachineError, NonFiniteError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.report.compare import FinishedRun

SIX = (
    "feature-extractor",
    "feature-extractor-bn-eval",
    "bn-only",
    "discriminative",
    "discriminative-bn-frozen",
    "deep-head",
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Train several recipes on the same data, or take finished runs, and say which differences are real.

    Takes every option of train, for all recipes alike. Each run goes into --output-dir (default:
    runs/compare-<data>), as <recipe>/seed-<n>; the same command again goes on where it was interrupted. Writes
    compare.md, compare.csv, compare.json and compare.png there.
    """

    REFUSED: ClassVar = ("recipe", "resume", "overwrite")  # options of train without a meaning here

    recipes: tuple[str, ...] = SIX
    """The recipes to compare."""
    seeds: int = 1
    """Runs of each recipe, with the seeds --seed, --seed + 1 and so on."""
    runs: tuple[str, ...] = ()
    """Folders of finished runs to take too; without DATA, only these."""

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


def read(arguments: Sequence[str]) -> list[Config]:
    """A config for each recipe, all below the same options; one without a recipe for finished runs alone.

    Raises UsageError with every problem of every recipe.
    """
    words = typed(Config, arguments, "resnet-dist compare")
    if "recipe" in words.given:
        raise UsageError(f"--recipe: compare takes --recipes {words.given['recipe']}")
    if "resume" in words.given:
        raise UsageError("--resume belongs to train: the same compare command goes on by itself")
    names = convert(tuple[str, ...], words.given.get("recipes", SIX))
    configs: list[Config] = []
    problems: dict[str, None] = {}
    for name in dict.fromkeys(names):
        try:
            configs.append(resolve(Config, {**words.given, "recipe": name}, words.problems))
        except UsageError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UsageError(list(problems))
    return configs or [resolve(Config, words.given, words.problems)]


def main(configs: Sequence[Config]) -> int:
    """Train what is not trained yet, compare, print and write. Returns the exit code.

    Raises NonFiniteError, after the comparison of the others, if a run diverged.
    """
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.training.run import run_training

    cfg = configs[0]
    accelerator, _ = start(cfg.system)
    trainings = [] if cfg.data.data is None else [(config, seed) for config in configs for seed in range(cfg.seeds)]
    folder = Path(cfg.run.output_dir or f"runs/compare-{Path(cfg.data.data or '').stem}")
    if cfg.run.dry_run:
        for config in configs:
            run_training(training(config, 0, folder))
        return 0
    others = [Path(run) for run in cfg.runs]
    planned = [Path(training(config, seed, folder).run.output_dir or "") for config, seed in trainings]
    on_main(accelerator, lambda: check_distinct([*planned, *others]))
    on_main(accelerator, lambda: prepare(folder, configs if trainings else [], others))
    done: dict[str, list[Path]] = {}
    diverged = []
    for number, (config, seed) in enumerate(trainings, 1):
        single = as_begun(accelerator, training(config, seed, folder))
        if accelerator.is_main_process:
            print(f"\ncompare {number}/{len(trainings)}: {config.recipe}, seed {single.run.seed}", flush=True)
        try:
            run_training(single)
            done.setdefault(str(config.recipe), []).append(Path(single.run.output_dir or ""))
        except NonFiniteError as error:
            diverged.append(f"{single.run.output_dir} is left out: {error}")
    on_main(accelerator, lambda: conclude(folder, done, others))
    if diverged:
        raise NonFiniteError("; ".join(diverged))
    return 0


def training(cfg: Config, number: int, folder: Path) -> TrainConfig:
    """What `train` is given for one run: its own folder, its seed, and to go on with what is there."""
    seed = cfg.run.seed + number
    run = dataclasses.replace(
        cfg.run, seed=seed, output_dir=str(folder / str(cfg.recipe) / f"seed-{seed}"), resume="auto"
    )
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{**fields, "run": run})


def as_begun(accelerator: "Accelerator", cfg: TrainConfig) -> TrainConfig:
    """With the random stream of the run that is there, if there is one: an older version may have begun it."""
    from resnet_dist.runtime.accelerate import on_main

    where = {"resume": "auto", "output_dir": cfg.run.output_dir}
    stored = on_main(accelerator, lambda: stored_config(where).get("run"))
    stream = stored.get("random_stream") if isinstance(stored, dict) else None
    if not isinstance(stream, int) or cfg.run.random_stream is not None:
        return cfg
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, random_stream=stream))


def check_distinct(runs: Sequence[Path]) -> None:
    """Raises UsageError where one run folder is named twice, in whatever spelling: it would count as two seeds."""
    first: dict[Path, Path] = {}
    for run in runs:
        other = first.setdefault(run.resolve(), run)
        if other is not run:
            raise UsageError(f"--runs {run}: the same run as {other}, which would count twice; name it once")


def prepare(folder: Path, configs: Sequence[Config], others: Sequence[Path]) -> None:
    """Make the folder, and see that what it holds was asked for with the same options, and that others are done.

    What was asked for stands in <recipe>/asked.toml. Raises UsageError, ArtifactError, MachineError.
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
        raise MachineError(f"{folder}: cannot be made into a folder ({error.strerror})") from None
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


def asked_for(cfg: Config) -> Layer:
    """What decides the result of a recipe's runs, apart from the seed."""
    values = kept(training(cfg, 0, Path()))
    values["run"] = {name: value for name, value in values["run"].items() if name != "seed"}
    values["data"] = {name: value for name, value in values["data"].items() if name != "workers"}
    return {name: value for name, value in values.items() if name != "system"}


def conclude(folder: Path, trained: Mapping[str, Sequence[Path]], others: Sequence[Path]) -> None:
    """Compare and print. On the main process. Raises UsageError, ArtifactError, MachineError."""
    from resnet_dist.report.compare import by_settings, read_run, write_comparison

    groups: dict[str, list[FinishedRun]] = {name: [read_run(path) for path in paths] for name, paths in trained.items()}
    groups |= by_settings([read_run(path) for path in others])
    if not groups:  # every run diverged
        return
    print()
    for line in write_comparison(folder, groups):
        print(line)
    print(f"\nwritten: {folder / 'compare.md'}, compare.csv, compare.json, compare.png")
