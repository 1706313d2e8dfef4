"""The rules of docs/architecture.md that can be read off the source: who imports whom, what is not said."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "slm_jax"
# A room may import rooms of a lower rank, and of its own where no circle comes of it.
RANKS = {
    "errors": 0,
    "object_stores": 0,
    "storage": 0,
    "appended": 0,
    "multihost": 1,
    "audio": 1,
    "models": 2,
    "decoding": 3,
    "checkpoints": 3,
    "partitioning": 3,
    "training": 4,
    "evaluation": 4,
    "export": 4,
    "cli": 5,
    "t5x_partner": 5,
}
# Rooms that stand beside, and who may know them: what trains is handed its data.
BESIDE = {
    "data": {"data", "tasks", "evaluation", "demo", "cli", "t5x_partner"},
    "tasks": {"tasks", "demo", "cli"},
    "demo": {"demo", "tasks", "cli"},
}
BESIDE_MAY_IMPORT = {
    "data": {"errors", "storage", "data", "partitioning"},
    "tasks": {"errors", "data", "tasks", "evaluation", "demo"},
    "demo": {"errors", "data", "demo", "evaluation"},
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
TENSORFLOW_ROOMS = {"data", "tasks", "t5x_partner"}
MARKERS = re.compile(r"\b(TODO|FIXME|XXX|HACK|for now|simplified|placeholder)\b", re.IGNORECASE)


class Import(NamedTuple):
    """One import: where it stands, the module, and whether it runs when its file is imported."""

    room: str
    place: str
    module: str
    at_top: bool


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_top = False
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found.extend(Import(room_of(path), place, module, at_top) for module in modules)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


ALL = [found for path in sources() for found in imports_of(path)]


def own_rooms() -> list[tuple[Import, str]]:
    """Imports of our own rooms, with the room that each asks for."""
    ours = [found for found in ALL if found.module.startswith("slm_jax.")]
    return [(found, found.module.split(".")[1]) for found in ours]


def test_every_room_has_a_rank():
    rooms = {room_of(path) for path in sources()} - {"__init__"}
    assert rooms == RANKS.keys() | BESIDE.keys()


def test_arrows_point_one_way():
    for found, asked in own_rooms():
        where = f"{found.place} imports {found.module}"
        if asked in BESIDE:
            assert found.room in BESIDE[asked], where
        elif found.room in BESIDE_MAY_IMPORT:
            assert asked in BESIDE_MAY_IMPORT[found.room], where
        elif asked in RANKS:
            assert RANKS[asked] <= RANKS[found.room], where
            assert found.room != "models" or asked in {"errors", "audio", "models"}, where


def test_no_rooms_import_each_other():
    edges: dict[str, set[str]] = {}
    for found, asked in own_rooms():
        if asked != found.room:
            edges.setdefault(found.room, set()).add(asked)

    def reach(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, " -> ".join((*seen, room))
        for other in edges.get(room, ()):
            reach(other, (*seen, room))

    for room in edges:
        reach(room, ())


def test_gin_is_known_in_cli_alone():
    rooms = {found.room for found in ALL if found.module.split(".")[0] == "gin"}
    assert rooms == {"cli"}


def test_t5x_is_known_in_its_own_room_alone():
    assert {found.room for found in ALL if found.module.split(".")[0] == "t5x"} == {"t5x_partner"}
    assert {found.room for found, asked in own_rooms() if asked == "t5x_partner"} == {"t5x_partner"}
    assert "cli" not in {asked for found, asked in own_rooms() if found.room == "t5x_partner"}


def test_tensorflow_lives_in_data_and_tasks_and_lazily_in_evaluation():
    for found in ALL:
        if found.module.split(".")[0] in TENSORFLOW and found.room not in TENSORFLOW_ROOMS:
            assert found.room in {"evaluation", "cli", "demo"}, f"{found.place} imports {found.module}"
            assert not found.at_top, f"{found.place} imports {found.module} before it is asked for"


def test_tasks_are_imported_by_one_name():
    for found in ALL:
        assert found.module.split(".")[0] != "tasks", f"{found.place}: import slm_jax.tasks, never tasks"


def test_the_rules_see_a_breach(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "slm_jax")
    path = tmp_path / "slm_jax" / "models" / "wrong.py"
    path.parent.mkdir(parents=True)
    path.write_text("from slm_jax.data import batch\ndef f():\n    import seqio, gin.config\n")
    assert imports_of(path) == [
        Import("models", "slm_jax/models/wrong.py:1", "slm_jax.data.batch", True),
        Import("models", "slm_jax/models/wrong.py:3", "seqio", False),
        Import("models", "slm_jax/models/wrong.py:3", "gin.config", False),
    ]


def written_files() -> list[Path]:
    folders = ("slm_jax", "tasks", "tests", "gin", "docs", "benchmarks", "launch")
    kinds = {".py", ".md", ".gin", ".sh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "setup.py", ".ci/run")]
    return sorted([*files, *top])


@pytest.mark.parametrize("path", written_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_for_later(path: Path):
    if path == Path(__file__):
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = MARKERS.search(line)
        assert found is None, f"{path.relative_to(ROOT)}:{number}: {found[0]!r}"


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_a_function_lives_where_its_idea_lives(name: str):
    assert [path for path in sources() if path.stem == name] == []
