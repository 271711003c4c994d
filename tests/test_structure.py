"""The structure of the code: which way imports point, what is heavy, what is read, what must never be called.

Every rule is one test that lists all offenders.
"""

import ast
import dataclasses
import functools
import statistics
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from resnet_dist.config.schema import Phase, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for top in ("resnet_dist", "export") for file in (ROOT / top).rglob("*.py"))
HEAVY = ("torch", "torchvision", "accelerate", "safetensors", "sklearn", "matplotlib", "onnx", "onnxruntime")

# A module that does the whole work of a verb, from its settings to the files that it writes, is above the package that
# it is in: it computes, then has the result reported.
WHOLE = {
    "evaluation.explain",
    "evaluation.run",
    "report.run",
    "training.comparison",
    "training.demo",
    "training.finish",
    "training.lr_find",
    "training.reproduce",
    "training.run",
}
ABOVE = WHOLE | {"export.run", "export.serve.run"}

# Each layer may import those before it; packages of one layer do not know each other, but for the lowest.
LAYERS = (
    {"export.predict"},
    {"errors"},
    {"config", "files", "runtime"},
    {"data", "model"},
    {"evaluation"},
    {"training"},
    {"report"},
    ABOVE,
    {"bench"},
    {"cli", "__main__"},
)
LOWEST = LAYERS[2]
# The tools that make and check the deployed file are beside `resnet_dist` and use only these of it.
EXPORT_MAY_USE = {"errors", "config", "files", "runtime", "data", "model", "evaluation"}


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


def package_of(module: str) -> str:
    """The part of the program that a module is in: `data` for resnet_dist.data.index, `export.predict`, `errors`."""
    first, *rest = module.split(".")
    if ".".join(rest) in WHOLE:
        return ".".join(rest)
    return rest[0] if first == "resnet_dist" and rest else module


def layer_of(package: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if package in layer)


OURS = [name for name in MODULES if name.startswith("resnet_dist.")]


def test_every_package_has_a_layer() -> None:
    assert {package_of(module) for module in OURS} <= set().union(*LAYERS)


def test_imports_point_one_way() -> None:
    """To lower layers, wherever in the file they are (those for type checkers apart)."""
    offenders = []
    for module in OURS:
        package = package_of(module)
        free = {package, *next((layer for layer in (LOWEST, ABOVE, LAYERS[-1]) if package in layer), ())}
        for name in ours(imports(module)) - {"resnet_dist"}:
            other = package_of(name)
            if other not in free and layer_of(other) >= layer_of(package):
                offenders.append(f"{module} imports {name}")
    assert offenders == []


def test_data_and_model_do_not_know_each_other() -> None:
    other = {"data": "model", "model": "data"}
    offenders = [
        f"{module} imports {name}"
        for module in MODULES
        for name in ours(imports(module))
        if other.get(package_of(module)) == package_of(name)
    ]
    assert offenders == []


def test_package_imports_only_predict_from_export() -> None:
    """`export.predict` everywhere; the other modules only in the command line, measurements and the demo."""
    offenders = [
        f"{module} imports {name}"
        for module in OURS
        for name in ours(imports(module))
        if name.startswith("export")
        and name != "export.predict"
        and package_of(module) not in ("cli", "bench", "training.demo")
    ]
    assert offenders == []


def test_export_imports_few_modules_of_the_package() -> None:
    offenders = []
    for module in MODULES:
        if not module.startswith("export.") or module == "export.__main__":  # which is the command line
            continue
        for name in ours(imports(module)):
            if not (name.startswith("export") or name == "resnet_dist" or package_of(name) in EXPORT_MAY_USE):
                offenders.append(f"{module} imports {name}")
    assert offenders == []


def test_the_deployed_file_needs_no_other_module() -> None:
    """The standard library, numpy and Pillow; onnxruntime only when a model is loaded."""
    names = {name.split(".")[0] for name in imports("export.predict")}
    at_import = {name.split(".")[0] for name in imports("export.predict", module_level=True)}
    assert names <= {"numpy", "PIL", "onnxruntime"} | sys.stdlib_module_names
    assert at_import <= {"numpy", "PIL"} | sys.stdlib_module_names


SERVER_NEEDS = {"numpy", "PIL", "onnxruntime", "starlette", "uvicorn", "resnet_dist", "export"}


def test_the_server_needs_few_packages() -> None:
    """Beside the standard library: with torch, its container would be ten times as large."""
    needed = set().union(*(imports(module) for module in MODULES if module.startswith("export.serve")))
    below = {name for module in ("resnet_dist.cli.main", "resnet_dist.cli.serve") for name in imported_by(module)}
    at_import = set().union(*(imports(name, module_level=True) for name in (*below, *ours(frozenset(needed)))))
    assert {name.split(".")[0] for name in needed | at_import} <= SERVER_NEEDS | sys.stdlib_module_names


def imported_by(module: str) -> set[str]:
    """The modules of ours that are imported with a module, itself included."""
    names, new = {module}, {module}
    while new:
        direct = set().union(*(ours(imports(name, module_level=True)) for name in new))
        new = (direct & MODULES.keys()) - names
        names |= new
    return names


def heavy_at_import(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The heavy packages that a module imports, directly or through other modules of ours."""
    names = imports(module, module_level=True)
    found = {name for name in names if name.split(".")[0] in HEAVY}
    packages = {name.rpartition(".")[0] for name in ours(names)}
    for name in (ours(names) | packages) & MODULES.keys() - seen - {module}:
        found |= heavy_at_import(name, seen | {module})
    return found


LIGHT = {"cli", "config", "files", "errors", "__main__"}
LIGHT_RUNTIME = {f"resnet_dist.runtime.{name}" for name in ("environment", "machine", "streams", "wording")}


def test_light_modules_import_nothing_heavy() -> None:
    """Printing help and an error must not wait for torch."""
    light = [name for name in MODULES if package_of(name) in LIGHT or name in ("resnet_dist", "export")]
    offenders = {name: heavy for name in (*light, *LIGHT_RUNTIME) if (heavy := heavy_at_import(name))}
    assert offenders == {}


def test_reports_need_no_torch() -> None:
    """They are written from what was computed: only the model card knows networks."""
    free = [name for name in MODULES if package_of(name) == "report" and not name.endswith((".card", ".hub_folder"))]
    offenders = {
        name: heavy for name in free if (heavy := heavy_at_import(name) & {"torch", "torchvision", "accelerate"})
    }
    assert len(free) > 8 and offenders == {}


# Every setting is read


def sections() -> dict[str, type]:
    """The sections of the config of `train`, and `phase`."""
    kinds = typing.get_type_hints(TrainConfig)
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)} | {"phase": Phase}


def annotated(tree: ast.Module) -> dict[str, set[str]]:
    """The names that a module's functions and classes annotate with a class, by class: `cfg: DataConfig`."""
    names: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            names.setdefault(ast.unparse(node.annotation).strip("'"), set()).add(node.arg)
        elif isinstance(node, ast.AnnAssign):
            names.setdefault(ast.unparse(node.annotation).strip("'"), set()).add(ast.unparse(node.target))
    return names


def settings_read(module: str) -> set[tuple[str, str]]:
    """(section, attribute) of all that a module reads of the sections: `x.optim.lr`, or `cfg.lr` of an OptimConfig."""
    tree = tree_of(module)
    owners = {
        (name, section) for section, kind in sections().items() for name in annotated(tree).get(kind.__name__, ())
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            last = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            found |= {(section, node.attr) for name, section in owners if name == last}
            if isinstance(owner, ast.Attribute) or last == "phase":
                found.add((last, node.attr))
    return found


def test_every_setting_has_a_reader() -> None:
    """Below the command line, which has other configs with fields of the same names: an unread option is a lie."""
    readers = [m for m in MODULES if package_of(m) not in ("config", "cli", "bench") and not m.startswith("export")]
    read = set().union(*(settings_read(module) for module in readers))
    fields = [(section, field.name) for section, kind in sections().items() for field in dataclasses.fields(kind)]
    assert len(fields) > 80
    assert [f"{section}.{name}" for section, name in fields if (section, name) not in read] == []


# Size and names

DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "base"}


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def test_no_module_is_called_utils_or_the_like() -> None:
    assert [module for module in MODULES if set(module.split(".")) & DRAWERS] == []


def test_no_function_is_longer_than_70_lines() -> None:
    assert [f"{m}.{node.name}" for m in MODULES for node in functions(m) if length(node) > 70] == []


def test_functions_are_short() -> None:
    assert statistics.median(length(node) for module in MODULES for node in functions(module)) <= 15


def test_every_module_has_a_docstring() -> None:
    assert [module for module in MODULES if not ast.get_docstring(tree_of(module))] == []


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


def unsafe(module: str) -> Iterator[str]:
    """What of a module could run what it reads."""
    yield from {name for name in imports(module) if name.split(".")[0] in FORBIDDEN_MODULES}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            yield f"pickle.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            yield "from pickle"
    for name, call in calls(module):
        if name in FORBIDDEN_CALLS or name.endswith(FORBIDDEN_ENDINGS):
            yield name
        if "shell" in keywords(call) or keywords(call).get("allow_pickle", "False") != "False":
            yield name
        loads = name in ("torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url")
        if loads and keywords(call).get("weights_only") != "True":
            yield name


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    """Only the error class of pickle is used; torch.load gets weights_only; no shell, no code from text."""
    assert [f"{module}: {what}" for module in MODULES for what in unsafe(module)] == []


def test_images_are_opened_only_in_named_formats() -> None:
    """Pillow would hand others to external programs."""
    offenders = [
        module
        for module in MODULES
        for name, call in calls(module)
        if name in ("Image.open", "PIL.Image.open") and "formats" not in keywords(call)
    ]
    texts = {module: file.read_text() for module, file in MODULES.items()}
    assert not offenders
    assert not [m for m, text in texts.items() if "MAX_IMAGE_PIXELS = None" in text or "LOAD_TRUNCATED_IMAGES" in text]


def test_only_verbs_and_public_names_are_imported_by_name() -> None:
    importers = {module for module in MODULES for name, _ in calls(module) if "import_module" in name}
    assert importers == {"resnet_dist", "resnet_dist.cli.main"}


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
    assert readers == {"resnet_dist.runtime.environment"}


def test_nothing_is_caught_blindly() -> None:
    """`except Exception` hides bugs: code that catches everything raises it again, or an error of ours."""
    offenders = []
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "BaseException"
                passed_on = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if caught in ("Exception", "BaseException") and not passed_on:
                    offenders.append(f"{module}:{node.lineno}")
    assert offenders == []
