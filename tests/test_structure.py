"""The shape of the house: which way imports point, what is heavy, what is read, what must never be called."""

import ast
import dataclasses
import functools
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.config import Duration, Phase, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for top in ("resnet_dist", "export") for file in (ROOT / top).rglob("*.py"))
HEAVY = ("torch", "torchvision", "accelerate", "safetensors", "sklearn", "matplotlib", "onnx", "onnxruntime")

# Each floor may import those below it; rooms on one floor do not know each other.
FLOORS = (
    {"export.predict"},
    {"errors", "duration", "fields", "wording", "recipes", "reading"},
    {"header", "launcher", "outputs", "streams"},
    {"stop"},
    {"config"},
    {"run_folder", "provenance"},
    {"stored"},
    {"options"},
    {"data", "model"},
    {"faults"},
    {"distributed"},
    {"evaluate"},
    {"train"},
    {"report"},
    {"bench", "verbs", "cli", "__main__"},
)
# The tools that make and check the deployed file stand at the top, beside `resnet_dist`, and use only these of it.
EXPORT_MAY_USE = {
    "errors",
    "config",
    "fields",
    "wording",
    "launcher",
    "options",
    "outputs",
    "run_folder",
    "distributed",
}
EXPORT_MAY_USE |= {"data", "model", "evaluate"}


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, module_level: bool) -> Iterator[ast.AST]:
    """All nodes that run; with `module_level`, those that run at import."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from statements(child, module_level)


@functools.cache
def imports(module: str, module_level: bool = False) -> frozenset[str]:
    """Names of the modules that a module imports, as precisely as the statement says."""
    found = set()
    for node in statements(tree_of(module), module_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = parts & MODULES.keys()
            found |= ours | ({node.module or ""} if parts - ours else set())
    return frozenset(found)


def ours(names: frozenset[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("resnet_dist", "export")}


def room_of(module: str) -> str:
    """The part of the house that a module is in: `data` for resnet_dist.data.index, `export.predict`, `config`."""
    first, *rest = module.split(".")
    return rest[0] if first == "resnet_dist" and rest else module


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def test_every_module_has_its_place() -> None:
    rooms = {room_of(module) for module in MODULES if module.startswith("resnet_dist.")}
    assert rooms <= set().union(*FLOORS), "a new room: say in FLOORS which floor it is on"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("resnet_dist.")])
def test_imports_point_one_way(module: str) -> None:
    """Downwards, wherever in the file they stand (those for type checkers apart); verbs may call verbs."""
    room = room_of(module)
    for name in ours(imports(module)) - {"resnet_dist"}:
        other = room_of(name)
        below = floor_of(other) < floor_of(room) or room in FLOORS[-1]
        assert other == room or below, f"{module} imports {name}"


@pytest.mark.parametrize("room", ["data", "model"])
def test_data_and_model_do_not_know_each_other(room: str) -> None:
    other = {"data": "model", "model": "data"}[room]
    for module in MODULES:
        if room_of(module) == room:
            assert not any(room_of(name) == other for name in ours(imports(module))), module


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("resnet_dist.")])
def test_the_program_knows_of_export_only_what_is_copied(module: str) -> None:
    """`export.predict`, and the tools only where a verb calls them."""
    used = {name for name in ours(imports(module)) if name.startswith("export")}
    assert used <= {"export.predict"} or room_of(module) == "verbs"


def test_export_uses_little_of_the_program() -> None:
    for module in MODULES:
        if not module.startswith("export.") or module == "export.__main__":  # which is the command line
            continue
        for name in ours(imports(module)):
            allowed = name.startswith("export") or name == "resnet_dist" or room_of(name) in EXPORT_MAY_USE
            assert allowed or name == "resnet_dist.train.checkpoint", f"{module} imports {name}"


def test_the_deployed_file_stands_alone() -> None:
    """The standard library, numpy and Pillow; onnxruntime only where a model is run."""
    names = {name.split(".")[0] for name in imports("export.predict")}
    at_import = {name.split(".")[0] for name in imports("export.predict", module_level=True)}
    assert names <= {"numpy", "PIL", "onnxruntime"} | sys.stdlib_module_names
    assert at_import <= {"numpy", "PIL"} | sys.stdlib_module_names


def heavy_at_import(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """What heavy packages importing a module brings, through whatever of ours it imports."""
    names = imports(module, module_level=True)
    found = {name for name in names if name.split(".")[0] in HEAVY}
    packages = {name.rpartition(".")[0] for name in ours(names)}
    for name in (ours(names) | packages) & MODULES.keys() - seen - {module}:
        found |= heavy_at_import(name, seen | {module})
    return found


LIGHT = {"cli", "config", "options", "errors", "recipes", "verbs", "launcher", "run_folder", "wording", "__main__"}
LIGHT |= {"provenance", "reading", "header", "stored", "outputs"}


@pytest.mark.parametrize(
    "module",
    [name for name in MODULES if room_of(name) in LIGHT or name in ("resnet_dist", "export", "export.predict")],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """Printing help and an error must not wait for torch."""
    assert heavy_at_import(module) == set()


# Every setting is read


def settings() -> list[tuple[str, str]]:
    """(section, field) of everything that can be configured."""
    kinds = typing.get_type_hints(TrainConfig)
    found = [("phase", field.name) for field in dataclasses.fields(Phase)]
    for section, kind in kinds.items():
        if dataclasses.is_dataclass(kind) and kind is not Duration:
            found += [(section, field.name) for field in dataclasses.fields(kind)]
    return found


# Read as a whole and not by name.
READ_OTHERWISE: dict[tuple[str, str], str] = {}


@functools.cache
def attributes_read() -> frozenset[str]:
    found = set()
    for module in MODULES:
        if module not in ("resnet_dist.config", "resnet_dist.options", "resnet_dist.stored"):
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = node.value
                    last = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                    found.add(f"{last}.{node.attr}")
    return frozenset(found)


@pytest.mark.parametrize(("section", "field"), settings(), ids=lambda value: value)
def test_every_setting_has_a_reader(section: str, field: str) -> None:
    """As `cfg.field` of its own section, or `cfg.section.field`: a flag that nobody reads is a lie."""
    readers = {f"{section}.{field}", f"cfg.{field}"} & attributes_read()
    assert readers or (section, field) in READ_OTHERWISE


# Size and names


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_a_drawer_for_everything(module: str) -> None:
    assert not set(module.split(".")) & {"utils", "util", "common", "helpers", "helper", "misc", "base"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_fit_the_mind(module: str) -> None:
    # The predictor is shipped as one file, so its parts cannot be put into several.
    assert len(MODULES[module].read_text().splitlines()) <= (1120 if module == "export.predict" else 450)
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 70, node.name


def test_functions_are_short() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 15


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree_of(module))


# What must never be called


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "_pickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save", "torch.hub.load"}
FORBIDDEN_ENDINGS = ("accelerator.load_state", "accelerator.save_state", ".register_for_checkpointing", ".extractall")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_or_runs_what_it_reads(module: str) -> None:
    """Of pickle only the name of its error is known; torch.load is told so; no shell, no code from text."""
    assert not {name.split(".")[0] for name in imports(module)} & FORBIDDEN_MODULES
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError"
        assert not (isinstance(node, ast.ImportFrom) and node.module == "pickle")
    for name, call in calls(module):
        assert name not in FORBIDDEN_CALLS and not name.endswith(FORBIDDEN_ENDINGS), name
        assert "shell" not in keywords(call) and keywords(call).get("allow_pickle", "False") == "False", name
        if name in ("torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url"):
            assert keywords(call).get("weights_only") == "True", name


@pytest.mark.parametrize("module", MODULES)
def test_images_are_opened_only_in_named_formats(module: str) -> None:
    """Pillow would hand others to external programs."""
    for name, call in calls(module):
        if name in ("Image.open", "PIL.Image.open"):
            assert "formats" in keywords(call)
    text = MODULES[module].read_text()
    assert "MAX_IMAGE_PIXELS = None" not in text and "LOAD_TRUNCATED_IMAGES" not in text


@pytest.mark.parametrize("module", MODULES)
def test_only_the_table_of_verbs_is_imported_by_name(module: str) -> None:
    assert module == "resnet_dist.cli" or not any("import_module" in name for name, _ in calls(module))


def variables_read(module: str) -> set[str]:
    """The environment variables that a module asks for."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            found.add(ast.unparse(node.args[0]))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            found.add(ast.unparse(node.slice))
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[-1]) == "os.environ":
            found.add(ast.unparse(node.left))
    return {name.strip("'") for name in found}


SET_BY_LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"}


def test_one_module_reads_what_launchers_set() -> None:
    """Else two places could decide differently how many processes there are."""
    readers = {module for module in MODULES if variables_read(module) & SET_BY_LAUNCHERS}
    assert readers == {"resnet_dist.launcher"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_caught_blindly(module: str) -> None:
    """`except Exception` hides bugs: whoever catches everything passes it on, or raises an error of ours."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "BaseException"
            if caught in ("Exception", "BaseException"):
                assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), module
