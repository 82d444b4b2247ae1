"""The house of CONTRIBUTING.md, read from the source: imports go downwards, and a file is one idea with one name."""

import ast
import graphlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "gradaccum"
MIN_LINES, MAX_LINES = 40, 400
SHORT = {"__init__.py", "__main__.py"}  # they may be as short as they are

# From the ground up. A room is a file or a folder directly under the package.
LAYERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("words", frozenset({"errors", "types", "tree", "norms"})),
    ("drawing", frozenset({"report"})),  # knows tables and curves, and nothing of what is in them: anybody may draw
    ("stages", frozenset({"split", "losses", "gradients", "sync", "memory"})),
    ("inside the sample", frozenset({"chunks"})),
    ("window", frozenset({"window"})),
    ("random draws", frozenset({"randomness"})),
    ("whole batch", frozenset({"whole_batch"})),
    ("fit", frozenset({"fit"})),
    ("checking", frozenset({"checking"})),
    ("auditing", frozenset({"auditing"})),  # it is handed what makes a step, so both ways to train may offer it
    ("a batch in hand", frozenset({"batch_run"})),
    ("ways to train", frozenset({"accumulator", "train_step"})),
    ("checkpoint", frozenset({"checkpoint"})),
    ("tools", frozenset({"advice", "audit_model"})),
    ("edges", frozenset({"integrations", "conformance", "testing", "cli"})),
)
LEVEL = {room: level for level, (_, rooms) in enumerate(LAYERS) for room in rooms}
STAGES, EDGES = 2, len(LAYERS) - 1
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
    return found + _circle(graph)


def circles(package: Path) -> list[str]:
    """A circle of imports between files, within a room too; imports for type checking only make none.

    Not even lazy ones may: neither of the files can be read, moved or tested without the other.
    """
    files = {".".join([package.name, *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__"): path
             for path in sorted(package.rglob("*.py"))}  # fmt: skip
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        if module == package.name:
            continue  # the door sees every file, and no file but those of the edges comes in through it
        for _, target, names, is_for_types in _imports(path, package):
            if not is_for_types:
                inside = {f"{target}.{name}" for name in names} & files.keys()
                # `from folder import file` reads the file; any other name is read from the target itself.
                is_only_files = bool(names) and len(inside) == len(set(names))
                found = inside if is_only_files else inside | {target}
                graph.setdefault(module, set()).update(found - {module, package.name})
    return _circle(graph)


def shapes(package: Path) -> list[str]:
    """Files that are too long or too short, and names that stand twice in the package."""
    paths, found = sorted(package.rglob("*.py")), list[str]()
    for path in paths:
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        where = path.relative_to(package)
        if num_lines > MAX_LINES:
            found.append(f"{where}: {num_lines} lines, at most {MAX_LINES}: it has more than one idea")
        if num_lines < MIN_LINES and path.name not in SHORT:
            found.append(f"{where}: {num_lines} lines, at least {MIN_LINES}: let it be part of the file that uses it")
    names = Counter(path.name for path in paths if path.name not in SHORT)
    return found + [f"{times} files are called {name}" for name, times in names.items() if times > 1]


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["a circle of imports: " + " -> ".join(error.args[1])]
    return []


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
    for line, module, names, _ in _imports(path, package):
        if module != package.name:
            yield line, module.split(".")[1]
        else:  # each may be a room, or one of the package's own names
            rooms = LEVEL.keys() | {_room_of_file(file, package) for file in package.rglob("*.py")}
            yield from ((line, name if name in rooms else DOOR) for name in names or [DOOR])


def _imports(path: Path, package: Path) -> Iterator[tuple[int, str, list[str], bool]]:
    """Line, module and names of every import of something in the package, and whether only type checkers see it."""
    parents = [package.name, *path.relative_to(package).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for_types = {inner for node in ast.walk(tree) if isinstance(node, ast.If)
                 and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
                 for statement in node.body for inner in ast.walk(statement)}  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        found: list[tuple[str, list[str]]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [(module, [alias.name for alias in node.names])]
        elif ast.unparse(node.func).endswith(("import_module", "__import__")):
            found = [(str(arg.value), []) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for module, names in found:
            if module.split(".")[0] == package.name:
                yield node.lineno, module, names, node in for_types


def test_imports_go_downwards() -> None:
    assert not violations(SRC), "\n".join(violations(SRC))


def test_the_layers_name_real_rooms() -> None:
    present = {_room_of_file(path, SRC) for path in SRC.rglob("*.py")}
    assert {"errors", "split", "losses", "window", "accumulator", "train_step"} <= present & LEVEL.keys()


def test_files_import_in_no_circle() -> None:
    assert not circles(SRC), "\n".join(circles(SRC))


def test_a_file_is_one_idea_with_one_name() -> None:
    assert not shapes(SRC), "\n".join(shapes(SRC))


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
        {"window/update.py": "def f():\n    import gradaccum.accumulator"}, r"update.py:2: window .* accumulator"),
    "upward, by name": (
        {"window/update.py": "import_module('gradaccum.accumulator')"}, r"window .* imports accumulator"),
    "upward, types only": (
        {"window/update.py": "if TYPE_CHECKING:\n    from gradaccum.accumulator import A"}, r"above it"),
    "stage to stage": ({"split/cut.py": "from gradaccum.losses import L"}, r"one stage never imports another"),
    "to an unknown room": (
        {"window/update.py": "from gradaccum.helpers import h"}, r"imports 'helpers', which belongs to no"),
    "through the door": ({"window/update.py": "from gradaccum import Loss"}, r"window imports the package itself"),
    "the door in full": ({"window/update.py": "import gradaccum"}, r"window imports the package itself"),
    "unknown room": ({"helpers.py": ""}, r"'helpers' belongs to no layer"),
    "unknown folder": ({"helpers/more/x.py": ""}, r"'helpers' belongs to no layer"),
    "circle": ({"types.py": "from .tree import T", "tree.py": "from .types import T"}, r"a circle of imports: t"),
}  # fmt: skip


CIRCLES = {
    "none": ({"a.py": "from gradaccum.b import f", "b.py": "import torch\nfrom gradaccum.deep import c"}, None),
    "within a room": ({"deep/a.py": "from .b import f", "deep/b.py": "from . import a"}, r"gradaccum\.deep\.[ab] -> "),
    "of three": (
        {"a.py": "import gradaccum.b", "b.py": "from gradaccum.deep import c", "deep/c.py": "from ..a import f"},
        r"circle of imports: (gradaccum\.(a|b|deep\.c) -> ){3}",
    ),
    "lazy": ({"a.py": "from .b import f", "b.py": "def f():\n    from .a import g"}, r"gradaccum\.[ab]"),
    "through a folder's own names": (
        {"deep/__init__.py": "from .c import f", "deep/c.py": "from gradaccum.deep import f"}, r"gradaccum\.deep -> "
    ),
    "for types only": ({"a.py": "from .b import f", "b.py": "if TYPE_CHECKING:\n    from .a import g"}, None),
    "not for types": (
        {"a.py": "from .b import f", "b.py": "if TYPE_CHECKING:\n    pass\nelse:\n    from .a import g"},
        r"gradaccum\.[ab]",
    ),
    "through the door": ({"__init__.py": "from .a import f", "a.py": "import gradaccum as ga"}, None),
}  # fmt: skip

SHAPES = {
    "fine": ({"a/x.py": MIN_LINES, "y.py": MAX_LINES, "a/__init__.py": 1, "__init__.py": 1, "__main__.py": 0}, None),
    "too long": ({"a/x.py": MAX_LINES + 1}, r"a/x\.py: 401 lines, at most 400"),
    "too short": ({"a/x.py": MIN_LINES - 1}, r"a/x\.py: 39 lines, at least 40"),
    "one name twice": ({"a/x.py": MIN_LINES, "b/x.py": MIN_LINES}, r"2 files are called x\.py"),
}


GROUND = {"__init__.py": "", "errors.py": "", "types.py": "", "losses/__init__.py": "", "accumulator.py": ""}
GUARDS = [
    *(pytest.param(violations, {**GROUND, **files}, message, id=name) for name, (files, message) in CASES.items()),
    *(pytest.param(circles, {"__init__.py": "", "deep/__init__.py": "", "deep/c.py": "", **files}, message, id=name)
      for name, (files, message) in CIRCLES.items()),
    *(pytest.param(shapes, {path: "x = 1\n" * num_lines for path, num_lines in files.items()}, message, id=name)
      for name, (files, message) in SHAPES.items()),
]  # fmt: skip


@pytest.mark.parametrize(("guard", "files", "message"), GUARDS)
def test_the_guards(
    tmp_path: Path, guard: Callable[[Path], list[str]], files: dict[str, str], message: str | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "gradaccum" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = guard(tmp_path / "gradaccum")
    assert len(found) == (message is not None), found
    assert message is None or re.search(message, found[0])
