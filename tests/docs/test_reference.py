"""Pages of the reference that are written by hand name everything that the code has."""

import inspect
import re

from export.predict import METADATA, Preprocessing
from export.to_onnx import IR_VERSION, OPSET, describe
from resnet_dist.config.layers import field_help
from resnet_dist.config.schema import Phase
from resnet_dist.runtime.environment import NUMBERS, VARIABLES
from tests.docs.markdown import DOCS, ROOT

READ = re.compile(
    r'environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*"([A-Z][A-Z_]+)"|"([A-Z][A-Z_]+)" (?:not )?in os\.environ'
)


# The keys of `describe` in export/to_onnx.py and of `Architecture.to_dict`.
METADATA_FIELDS = re.findall(r'^        "(\w+)": ', inspect.getsource(describe), re.MULTILINE)


def page(name: str) -> str:
    return (DOCS / "reference" / name).read_text()


def test_every_environment_variable_is_explained() -> None:
    files = [*(ROOT / "resnet_dist").rglob("*.py"), *(ROOT / "export").rglob("*.py")]
    read = {one or other for file in files for one, other in READ.findall(file.read_text())}
    assert len(read) > 5
    assert [name for name in sorted(read | {*VARIABLES, *NUMBERS}) if f"`{name}`" not in page("environment.md")] == []


def test_every_field_of_a_phase_is_explained() -> None:
    assert [name for name in field_help(Phase) if f"| `{name}` |" not in page("recipe-files.md")] == []


def test_onnx_page_says_what_is_written() -> None:
    text = page("onnx.md")
    assert f"opset {OPSET} and IR version {IR_VERSION}" in text and f"`{METADATA}`" in text
    fields = set(Preprocessing().to_dict()) - set(Preprocessing.RULES)
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
    assert [name for name in METADATA_FIELDS if f"`{name}`" not in text] == []
