"""Imports go downwards only: the house of CONTRIBUTING.md, read from the source and held."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "gradaccum"
MAX_LINES = 400

# From the ground up. A room is a file or a folder directly under the package.
LAYERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("words", frozenset({"errors", "types", "tree", "norms"})),
    ("stages", frozenset({"split", "losses", "gradients", "sync", "memory"})),
    ("window", frozenset({"window"})),
    ("whole batch", frozenset({"whole_batch"})),
    ("fit", frozenset({"fit"})),
    ("ways to train", frozenset({"accumulator", "train_step"})),
    ("checkpoint", frozenset({"checkpoint"})),
    ("tools", frozenset({"auditing"})),
    ("edges", frozenset({"report", "integrations", "testing", "cli"})),
)
LEVEL = {room: level for level, (_, rooms) in enumerate(LAYERS) for room in rooms}
STAGES, EDGES = 1, len(LAYERS) - 1
DOOR = "__init__"  # the package itself: it sees every room, and only the edges may come in through it


def violations(package: Path) -> list[str]:
    """Every import in `package` that does not go downwards, every room no layer knows, every circle of rooms.

    Lazy imports inside functions, imports for type checking only, and `import_module("literal")` count like any other.
    """
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        room = _room_of_file(path, package)
        if room == DOOR:
            continue
        if room not in LEVEL:
            found.append(f"{path.name}: {room!r} belongs to no layer; add it to LAYERS")
            continue
        for line, target in _imported_rooms(path, package):
            if target == room:
                continue
            problem = _problem(room, target)
            if problem:
                found.append(f"{path.relative_to(package)}:{line}: {problem}")
            elif target != DOOR:
                graph.setdefault(room, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("a circle of imports: " + " -> ".join(error.args[1]))
    return found


def _problem(room: str, target: str) -> str | None:
    level = LEVEL[room]
    if target == DOOR:
        return None if level == EDGES else f"{room} imports the package itself; import the room that has the name"
    if target not in LEVEL:
        return f"{room} imports {target!r}, which belongs to no layer"
    if LEVEL[target] > level:
        return f"{room} ({LAYERS[level][0]}) imports {target} ({LAYERS[LEVEL[target]][0]}), which is above it"
    if LEVEL[target] == level == STAGES:
        return f"{room} imports {target}: one stage never imports another"
    return None


def _room_of_file(path: Path, package: Path) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def _imported_rooms(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of something in the package, `DOOR` for a name of the package itself."""
    name = package.name
    parents = [name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module != name:
                targets = [module]
            else:  # each may be a room, or one of the package's own names
                rooms = LEVEL.keys() | {_room_of_file(file, package) for file in package.rglob("*.py")}
                targets = [f"{name}.{alias.name}" if alias.name in rooms else name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            targets = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for target in targets:
            head, *rest = target.split(".")
            if head == name:
                yield node.lineno, rest[0] if rest else DOOR


def test_imports_go_downwards() -> None:
    assert not violations(SRC), "\n".join(violations(SRC))


def test_the_layers_name_real_rooms() -> None:
    present = {_room_of_file(path, SRC) for path in SRC.rglob("*.py")}
    assert {"errors", "split", "losses", "window", "accumulator", "train_step"} <= present & LEVEL.keys()


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_is_one_idea(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines, at most {MAX_LINES}: it has more than one idea"


# -------------------------------------------------------------------------------------------- the guard itself can fail
CASES = {
    "fine": ({"losses/loss.py": "import torch\nfrom gradaccum.errors import E\nfrom gradaccum import types"}, None),
    "relative, fine": ({"losses/loss.py": "from ..errors import E\nfrom .terms import T", "losses/terms.py": ""}, None),
    "init sees all": ({"__init__.py": "from gradaccum.losses import L\nfrom gradaccum.cli import main"}, None),
    "an edge uses the door": ({"cli/__init__.py": "import gradaccum as ga\nfrom gradaccum import Loss"}, None),
    "upward": ({"errors.py": "from gradaccum.losses import L"}, r"errors.py:1: errors \(words\) imports losses"),
    "upward, relative": ({"errors.py": "from . import losses"}, r"errors \(words\) imports losses \(stages\)"),
    "upward, deep": ({"losses/loss.py": "\nfrom ..cli import main"}, r"loss.py:2: losses \(stages\) imports cli"),
    "upward, lazy": (
        {"window/update.py": "def f():\n    import gradaccum.accumulator"},
        r"update.py:2: window .* accumulator",
    ),
    "upward, by name": (
        {"window/update.py": "import_module('gradaccum.accumulator')"},
        r"window .* imports accumulator",
    ),
    "upward, types only": (
        {"window/update.py": "if TYPE_CHECKING:\n    from gradaccum.accumulator import A"},
        r"above it",
    ),
    "stage to stage": ({"split/cut.py": "from gradaccum.losses import L"}, r"one stage never imports another"),
    "to an unknown room": (
        {"window/update.py": "from gradaccum.helpers import h"},
        r"imports 'helpers', which belongs to no",
    ),
    "through the door": ({"window/update.py": "from gradaccum import Loss"}, r"window imports the package itself"),
    "the door in full": ({"window/update.py": "import gradaccum"}, r"window imports the package itself"),
    "unknown room": ({"helpers.py": ""}, r"'helpers' belongs to no layer"),
    "unknown folder": ({"helpers/more/x.py": ""}, r"'helpers' belongs to no layer"),
    "circle": ({"types.py": "from .tree import T", "tree.py": "from .types import T"}, r"a circle of imports: t"),
}


@pytest.mark.parametrize(("files", "message"), CASES.values(), ids=CASES.keys())
def test_the_layer_guard(tmp_path: Path, files: dict[str, str], message: str | None) -> None:
    package = tmp_path / "gradaccum"
    ground = {"__init__.py": "", "errors.py": "", "types.py": "", "losses/__init__.py": "", "accumulator.py": ""}
    for name, text in {**ground, **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    found = violations(package)

    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(message, found[0])
