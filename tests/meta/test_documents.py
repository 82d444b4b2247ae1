"""What the documents say is run: every Python block, every docstring example, every link.

The Python blocks of one Markdown file run in order and share their names. Two comments steer them, each on the line
right above a block or alone:

    <!-- not run: reason -->            the next block is shown only
    <!-- run first                      code that the reader need not see
    model = nn.Linear(2, 1)
    -->
"""

import doctest
import importlib
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "gradaccum"
EXECUTED = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
# Only what lies in the project's own folders: .venv and caches hold other people's documents.
LINKED = sorted([*ROOT.glob("*.md"), *(p for d in ("benchmarks", "docs", "examples", "src", "tests")
                                       for p in (ROOT / d).rglob("*.md"))])  # fmt: skip

PIECE = re.compile(
    r"(?P<not_run><!--[ ]*not[ ]run:[ ]*(?P<reason>\S.*?)[ ]*-->[ ]*\n\s*)?"
    r"^[ ]*```(?:python|py)\b[^\n]*\n(?P<block>.*?)^[ ]*```[ ]*$"
    r"|^<!--[ ]*run[ ]first[ ]*\n(?P<hidden>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)
OTHER_FENCE = re.compile(r"^([ ]*)(```+|~~~+)[^\n]*\n.*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)[^)]*\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")


def code_pieces(text: str) -> Iterator[tuple[int, str]]:
    """The line in the document (from 0) and the source of each piece of Python that is to be run."""
    for match in PIECE.finditer(text):
        if match["not_run"] is None:
            name = "block" if match["block"] is not None else "hidden"
            lines = match[name].splitlines(keepends=True)
            indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
            yield text.count("\n", 0, match.start(name)), "".join(line[indent:] or "\n" for line in lines)


def run_document(path: Path) -> dict[str, Any]:
    """Run a document's Python; tracebacks and warnings name the document's own lines."""
    namespace: dict[str, Any] = {"__name__": f"document_{path.stem}"}
    for line, source in code_pieces(path.read_text(encoding="utf-8")):
        exec(compile("\n" * line + source, str(path), "exec"), namespace)
    return namespace


def failed_examples(module: Any, names: dict[str, Any]) -> tuple[str, int]:
    """What went wrong in the docstring examples of `module` (nothing is ""), and how many there are."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner, report = doctest.DocTestRunner(optionflags=flags, verbose=False), list[str]()
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    return "".join(report), runner.tries


def broken_links(path: Path) -> list[str]:
    """The relative links of a document that lead to no file."""
    text = re.sub(r"`[^`\n]+`", "", OTHER_FENCE.sub("", path.read_text(encoding="utf-8")))
    targets = [first or second for first, second in LINK.findall(text)]
    files = [urllib.parse.unquote(t.split("#")[0]) for t in targets if not re.match(r"[a-z][a-z+.-]*:|#", t)]
    return [name for name in files if not (path.parent / name).exists()]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", EXECUTED, ids=_name)
def test_the_code_of_the_documents_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_document(path)


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=_name)
def test_the_examples_in_docstrings_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import gradaccum as ga

    if path.stem == "__main__":
        return  # importing it would run it
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    report, _ = failed_examples(module, {"torch": torch, "nn": nn, "F": F, "ga": ga})
    assert not report, report


@pytest.mark.parametrize("path", LINKED, ids=_name)
def test_the_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


def test_there_is_something_to_read() -> None:
    names = {_name(path) for path in EXECUTED}
    assert {"README.md", "README.zh.md", "docs/README.md"} <= names
    assert all(any(code_pieces((ROOT / name).read_text(encoding="utf-8"))) for name in ("README.md", "README.zh.md"))


# --------------------------------------------------------------------------------------- the guards themselves can fail
DOCUMENT = """# Title
<!-- run first
hidden = 1
-->
Text.
```python
shown = hidden + 1
```
<!-- not run: needs a cluster -->
```python
raise SystemExit
```
<!-- not run: a blank line between is no matter -->

```python
raise SystemExit
```
```bash
exit 1
```
- a list
  ```python
  if shown == 2:

      last = shown + 1
  ```
"""


def test_blocks_share_their_names_in_order_and_one_that_fails_is_found_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    names = run_document(path)
    assert (names["hidden"], names["shown"], names["last"]) == (1, 2, 3)
    path.write_text(DOCUMENT + "\n```python\n\nnot_there\n```\n", encoding="utf-8")
    with pytest.raises(NameError, match="not_there") as caught:
        run_document(path)
    assert caught.traceback[-1].lineno + 1 == path.read_text(encoding="utf-8").splitlines().index("not_there") + 1


def test_a_block_is_not_skipped_without_a_reason() -> None:
    assert list(code_pieces("<!-- not run: -->\n```python\nx = 1\n```\n")) == [(2, "x = 1\n")]


def test_a_wrong_docstring_example_is_found() -> None:
    module = type(pytest)("made_up", ">>> nn.Linear(2, 1).bias.shape\ntorch.Size([1])\n>>> 1 + 1\n3\n")
    report, num_examples = failed_examples(module, {"torch": torch, "nn": nn})
    assert num_examples == 2
    assert "Expected:\n    3\nGot:\n    2\n" in report
    assert report.count("Failed example") == 1


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there is.md").touch()
    path = tmp_path / "page.md"
    path.write_text(
        "[a](there%20is.md#part) [b](https://example.org/x) [c](#part) `[d](code.md)` [e](gone.md 'title')\n"
        '<img src="gone.png" width="1">\n```\n[f](fenced.md)\n```\n![g](<gone.svg>)\n',
        encoding="utf-8",
    )
    assert broken_links(path) == ["gone.md", "gone.png", "gone.svg"]
