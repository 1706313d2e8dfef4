"""docs/data.md lists the reasons of bad examples that the code gives, all of them and no other."""

import ast
import re
from pathlib import Path

from slm_jax.data import audio_files

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "slm_jax" / "data"


def given_in_code() -> set[str]:
    """The literal reasons of `BadExample(...)`."""
    calls = [
        node
        for path in DATA.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BadExample"
    ]
    first = [call.args[0] for call in calls if call.args]
    return {str(node.value) for node in first if isinstance(node, ast.Constant)}


def test_reasons_are_those_of_the_code():
    listed = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/data.md").read_text(), re.MULTILINE))
    tables = {
        name for name in listed if name not in {"audio", "duration", "language", "text", "translations", "id"}
    }
    source = "".join(path.read_text(encoding="utf-8") for path in DATA.rglob("*.py"))
    assert given_in_code() | set(audio_files.REASONS) <= tables
    for name in tables:
        assert f'"{name}"' in source, f"docs/data.md lists {name}, which nothing gives"
