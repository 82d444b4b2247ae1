"""Tables that name files are true: of each folder of the package, and of CONTRIBUTING.md."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "gradaccum"
MAX_FILES = 4  # of a folder without a README

TABLE = re.compile(r"^(?P<head>\|.*\|)[ ]*\n\|[-| :]+\|[ ]*\n(?P<rows>(?:\|.*(?:\n|\Z))*)", re.MULTILINE)
IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
# A folder, or a file with a suffix; what comes after a colon is a name inside of the file.
PATH = re.compile(r"([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|toml|json|txt))|[\w.-]+(?:/[\w.-]+)+)(?::.*)?")


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The heads and the rows of each Markdown table, cell by cell."""
    for match in TABLE.finditer(text):
        head, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")]
                       for line in (match["head"], *match["rows"].splitlines()))  # fmt: skip
        yield head, rows


def folder_complaints(folder: Path) -> list[str]:
    """What is wrong with the tables of one folder: its README's, and that of the docstring of its __init__."""
    present = {path.name for path in folder.glob("*.py") if path.name != "__init__.py"}
    num_files = len(present)
    present |= {f"{path.name}/" for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
    texts: dict[str, str] = {}
    readme, init = folder / "README.md", folder / "__init__.py"
    if readme.exists():
        texts["README.md"] = readme.read_text(encoding="utf-8")
    if init.exists():
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        if any(head[0] == "file" for head, _ in tables(docstring)):
            texts["__init__.py"] = docstring

    found = [] if "README.md" in texts or num_files <= MAX_FILES else [f"{num_files} files and no README.md"]
    for where, text in texts.items():
        named = [name for head, rows in tables(text) if head[0] == "file"
                 for row in rows for name in IN_BACKTICKS.findall(row[0])]  # fmt: skip
        found += [f"{where} does not name {name}" for name in sorted(present - set(named))]
        found += [f"{where} names {name}, which is not there" for name in sorted(set(named) - present)]
        found += [f"{where} names {name} {times} times" for name, times in Counter(named).items() if times > 1]
    return found


def contributing_complaints(text: str, root: Path) -> list[str]:
    """Files and rooms that tables name in backticks, relative to the package or the repository, and that do not exist.

    In a column headed "rooms" every word in backticks is a file or a folder of the package; elsewhere only what looks
    like a path is.
    """
    package, found = root / "src" / "gradaccum", list[str]()
    for head, rows in tables(text):
        for column, cell in ((head[i], cell) for row in rows for i, cell in enumerate(row)):
            for name in IN_BACKTICKS.findall(cell):
                if column == "rooms":
                    if not (package / name).is_dir() and not (package / f"{name}.py").is_file():
                        found.append(f"the room `{name}` does not exist")
                elif (path := PATH.fullmatch(name)) and not any((base / path[1]).exists() for base in (package, root)):
                    found.append(f"`{name}` is neither in src/gradaccum nor in the repository")
    return found


FOLDERS = sorted({path.parent for path in SRC.rglob("*") if path.suffix in (".py", ".md")} - {SRC})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(SRC)))
def test_a_folders_table_names_its_files(folder: Path) -> None:
    assert folder_complaints(folder) == []


def test_contributing_names_what_exists() -> None:
    found = contributing_complaints((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ROOT)
    assert not found, "\n".join(["CONTRIBUTING.md:", *found])


# -------------------------------------------------------------------------------------------- the guard itself can fail
def table(*rows: str) -> str:
    return "# x\n\nWhat it is.\n\n| file | idea |\n| --- | --- |\n" + "".join(
        f"| {row} | see `z.py` |\n" for row in rows
    )


FINE = table("`a.py`, `b.py`", "`deep/`")


@pytest.mark.parametrize(
    ("files", "complaints"),
    [
        pytest.param({"README.md": FINE}, [], id="fine"),
        pytest.param({"__init__.py": f'"""{FINE}"""'}, [], id="fine, in the docstring"),
        pytest.param({}, [], id="few files and no table"),
        pytest.param({"README.md": FINE + "\n| file |\n| --- |\n| `c.py` |", "c.py": ""}, [], id="two tables"),
        pytest.param({"README.md": table("`a.py`", "`deep/`")}, ["README.md does not name b.py"], id="missing file"),
        pytest.param({"README.md": table("`a.py` `b.py`")}, ["README.md does not name deep/"], id="missing folder"),
        pytest.param({"README.md": FINE + "| `gone.py` | |\n"}, ["README.md names gone.py, which is not there"],
                     id="surplus"),
        pytest.param({"README.md": FINE + "| `a.py` | |"}, ["README.md names a.py 2 times"], id="doubled"),
        pytest.param({"__init__.py": f'"""{FINE}"""', "c.py": ""}, ["__init__.py does not name c.py"],
                     id="docstring, missing"),
        pytest.param({**dict.fromkeys(("c.py", "d.py", "e.py"), ""),
                      "__init__.py": f'"""{table("`a.py`-`e.py`", "`deep/`")}"""'},
                     ["5 files and no README.md", *(f"__init__.py does not name {name}.py" for name in "bcd")],
                     id="too many for a docstring"),
    ],
)  # fmt: skip
def test_the_folder_guard(tmp_path: Path, files: dict[str, str], complaints: list[str]) -> None:
    for name, text in {"__init__.py": "", "a.py": "", "b.py": "", "deep/c.py": "", "__pycache__/a.pyc": ""}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(files.get(name, text), encoding="utf-8")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert folder_complaints(tmp_path) == complaints


def test_the_contributing_guard(tmp_path: Path) -> None:
    for name in ("src/gradaccum/split/by_cost.py", "src/gradaccum/errors.py", "tests/oracle.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = """
Outside of tables `gone.py` is not read.

| question | where |
| --- | --- |
| how a batch is cut, `nan` or `a.b` | `split/by_cost.py`, `split/`, `split/by_cost.py:split_by_cost`, `errors.py` |
| what proves it | `tests/oracle.py`; `gone/`, `split/gone.py:function`, `tests/gone` |

| layer | rooms |
| --- | --- |
| words | `errors` `split` `gone` |
"""
    assert contributing_complaints(text, tmp_path) == [
        *(f"`{name}` is neither in src/gradaccum nor in the repository"
          for name in ("gone/", "split/gone.py:function", "tests/gone")),
        "the room `gone` does not exist",
    ]  # fmt: skip


def test_errors_are_raised_where_their_tree_says() -> None:
    tree = (SRC / "errors.py").read_text(encoding="utf-8").partition("In brackets")[0]
    named = re.findall(r"── (\w+)|\[([^\]]+)\]", tree)
    error = ""
    for name, files in named:
        error = name or error
        for file in files.split(", ") if files else ():
            assert error in (SRC / file).read_text(encoding="utf-8"), f"{file} does not speak of {error}"
