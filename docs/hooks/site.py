"""The hook that mkdocs runs: reference pages from the code, tables from the benchmarks' results, and llms.txt.

A page may contain the line `<!-- generated: NAME -->`; the text of that name takes its place.
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmark_tables import benchmark_tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

from export import predict
from resnet_dist import errors
from resnet_dist.cli import spellings
from resnet_dist.cli.help import Entry, groups_of
from resnet_dist.cli.main import VERBS, module_of
from resnet_dist.config import recipes
from resnet_dist.config.layers import options_of
from resnet_dist.files.run import WRITTEN

PLACEHOLDER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
HIDDEN = (".tmp-", ".old-")  # folders that exist only while the program writes


def page_of(verb: str) -> str:
    """The file of a verb's reference page, relative to docs/."""
    return f"reference/{verb.replace(' ', '-')}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every verb."""
    for verb in VERBS:
        files.append(File.generated(config, page_of(verb), content=verb_page(verb)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated parts of a page. Raises KeyError if a page asks for a part that does not exist."""
    return PLACEHOLDER.sub(lambda match: PARTS[match[1]](), markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Write llms.txt, the index of all pages, in the order of the navigation."""
    files.append(File.generated(config, "llms.txt", content=llms_txt(nav)))
    return nav


def llms_txt(nav: Navigation) -> str:
    """The index of the pages, one line each: title, address, description."""
    lines = ["# resnet-dist", "", "> Fine-tune a torchvision ResNet on your images and ship it as verified ONNX.", ""]
    for page in nav.pages:
        text = page.file.content_string
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        description = re.search(r"^description: \"?(.+?)\"?$", text, re.MULTILINE)
        if title is None or description is None:
            raise ValueError(f"{page.file.src_uri}: it needs a title and a description")
        lines.append(f"- [{title[1].replace('`', '')}]({page.file.url}): {description[1]}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def verb_page(verb: str) -> str:
    """The reference page of a verb: what it does, and all its options."""
    head = f"---\ndescription: {json.dumps(VERBS[verb])}\n---\n\n# `resnet-dist {verb}`\n\n"
    if verb == "predict":
        return f"{head}{predict_options()}\n"
    module = importlib.import_module(module_of(verb))
    text = inspect.getdoc(module.Config) or ""
    positions = "".join(f" [{option.name.upper()}]" for option in options_of(module.Config) if option.positional)
    usage = f"```text\nresnet-dist {verb} [OPTIONS]{positions}\n```\n"
    groups = "\n".join(part for title, entries in groups_of(module.Config, {}) for part in group(title, entries))
    return f"{head}{text}\n\n{usage}\n{groups}"


def group(title: str, entries: list[Entry]) -> Iterator[str]:
    """A heading and a definition list of options, each with an anchor of its name."""
    yield f"## {title.capitalize()}\n"
    for entry in entries:
        anchor = entry.name.replace("_", "-")
        aliases = entry.aliases.strip(" []").removeprefix("also ")
        also = f" Also `{'`, `'.join(aliases.split(', '))}`." if aliases else ""
        yield f"`{entry.left}`{{ #{anchor} }}\n:   {escaped(entry.text)}{also}\n"


def escaped(text: str) -> str:
    """Text in which <, > and _ are no markup."""
    return re.sub(r"([_*])", r"\\\1", text.replace("<", "&lt;").replace(">", "&gt;"))


def predict_options() -> str:
    """The help of predict, which reads its own options because it also works without this package."""
    return f"```text\n{predict.parser_for('resnet-dist predict').format_help().strip()}\n```"


def verbs() -> str:
    """A table of the verbs."""
    rows = [f"| [`{verb}`]({Path(page_of(verb)).name}) | {text} |" for verb, text in VERBS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def recipe_texts() -> str:
    """Every recipe as it is shipped."""
    parts = []
    for name, text in recipes.texts().items():
        parts.append(f"## {name}\n\n{recipes.headline(name)}\n\n```toml\n{text}```\n")
    return "\n".join(parts)


def error_classes() -> str:
    """A table of the errors, from their classes."""
    rows = []
    for cls in vars(errors).values():
        if inspect.isclass(cls) and issubclass(cls, errors.ResnetDistError):
            text = (inspect.getdoc(cls) or "").splitlines()[0]
            rows.append((cls.exit_code, f"| {cls.exit_code} | `{cls.__name__}` | {text} |"))
    return "\n".join(["| exit code | Python error | meaning |", "|---|---|---|", *(row for _, row in sorted(rows))])


def run_files() -> str:
    """A table of every file that the program writes into a run folder."""
    rows = []
    for folder, names in WRITTEN.items():
        if not any(part in folder for part in HIDDEN):
            files = ", ".join(f"`{name}`" for name in names.split())
            rows.append(f"| {f'`{folder}`' if folder else 'the folder itself'} | {files} |")
    return "\n".join(["| folder | files |", "|---|---|", *rows])


# ---------------------------------------------------------------------------------------------------------------------
# Options of other tools


def foreign_options() -> str:
    """A table of the options of other tools that the program recognises, and what to type instead."""
    return there_and_here(spellings.OPTIONS, answered)


def foreign_verbs() -> str:
    """A table of the commands of other tools, and what to type instead."""
    return there_and_here(spellings.VERBS, lambda answer: f"`resnet-dist {answer}`")


def there_and_here(answers: Mapping[str, str], shown: Callable[[str], str]) -> str:
    """A table with a row for every answer and all the words that have it."""
    by_answer: dict[str, list[str]] = {}
    for typed, answer in answers.items():
        by_answer.setdefault(answer, []).append(f"`{typed}`")
    rows = [f"| {', '.join(typed)} | {shown(answer)} |" for answer, typed in by_answer.items()]
    return "\n".join(["| there | here |", "|---|---|", *rows])


def answered(answer: str) -> str:
    """What to type instead: an option in code font, or a sentence."""
    return f"`{answer}`" if re.fullmatch(r"--[a-z-]+", answer) else escaped(answer)


PARTS: Mapping[str, Any] = {
    "verbs": verbs,
    "recipes": recipe_texts,
    "errors": error_classes,
    "run-files": run_files,
    "foreign-options": foreign_options,
    "foreign-verbs": foreign_verbs,
    "benchmarks": lambda: benchmark_tables(Path(__file__).parents[2] / "benchmarks" / "results"),
}
