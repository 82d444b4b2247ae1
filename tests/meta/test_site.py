"""The documentation as a site: every page is in it, generated pages are as their source, public names are all there."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradaccum as ga
from gradaccum import errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
MAX_WORDS = 1_200  # of a page without contents
IN_NAV = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", CONFIGURATION, re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$|^<!-- run first\n(.*?)^-->$", re.MULTILINE | re.DOTALL)


def script(name: str) -> ModuleType:
    """A script of the folder `docs`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = script("generate")


def contents_complaint(text: str) -> str | None:
    """What is wrong with a long page: it must begin with links to all of its sections."""
    if len(text.split()) <= MAX_WORDS:
        return None
    sections = re.findall(r"^## (.*)$", FENCE.sub("", text), re.MULTILINE)
    beginning = text[: text.index("\n## ")]
    links = len(re.findall(r"\]\(#[^)]+\)", beginning))
    return None if links >= len(sections) else f"{links} links at its beginning to {len(sections)} sections"


@pytest.mark.parametrize("page", PAGES)
def test_a_long_page_has_contents(page: str) -> None:
    assert contents_complaint((DOCS / page).read_text(encoding="utf-8")) is None


def test_the_guard_of_long_pages() -> None:
    long = "word " * MAX_WORDS
    assert contents_complaint("# T\n\nshort\n\n## A\n") is None
    assert contents_complaint(f"# T\n\n[A](#a) [B](#b)\n\n## A\n\n{long}\n\n## B\n") is None
    assert contents_complaint(f"# T\n\n[A](#a)\n\n## A\n\n{long}\n\n## B\n") == "1 links at its beginning to 2 sections"


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(IN_NAV) == PAGES


def test_generated_pages_are_as_their_source() -> None:
    for path, text in generate.pages().items():
        assert (DOCS / path).read_text(encoding="utf-8") == text, f"docs/{path} is old: python docs/generate.py"


def test_every_public_name_is_in_the_reference_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # lightning sets a variable when it is imported
    named = re.findall(r"^::: gradaccum\.(\w+)$", "".join(generate.pages().values()), re.MULTILINE)
    assert sorted(named) == sorted(ga.__all__)
    for name in generate.INTEGRATIONS:
        module, _, attribute = name.rpartition(".")
        if module.endswith((".transformers", ".lightning", ".accelerate")):
            pytest.importorskip(module.rpartition(".")[2])
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def misnamed_arguments(function: Any) -> set[str]:
    """Names under ``Args:`` that are no parameters, which the builder of the site takes for a mistake."""
    parameters = inspect.signature(function).parameters
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", text, re.MULTILINE)
    named = re.findall(r"^    ([^ :][^:]*): ", section[1] if section else "", re.MULTILINE)
    return {name for name in named if name.strip("`*") not in {one.strip("*") for one in parameters}}


def test_documented_arguments_are_those_of_the_signature() -> None:
    found: dict[str, set[str]] = {}
    for name in ga.__all__:
        value = getattr(ga, name)
        if not callable(value) or (isinstance(value, type) and issubclass(value, BaseException)):
            continue
        members = vars(value).items() if isinstance(value, type) else ()
        for member, function in [("", value), *((f".{key}", one) for key, one in members if inspect.isfunction(one))]:
            if not member.startswith("._") and (wrong := misnamed_arguments(function)):
                found[name + member] = wrong
    assert not found


def test_the_guard_of_arguments() -> None:
    def documented(first: int, second: int) -> None:
        """Does.

        Args:
            first: a number.
            second, third: two in one line.
        """

    assert misnamed_arguments(documented) == {"second, third"}


def test_it_is_built_without_a_warning(tmp_path: Path) -> None:
    """As ``make docs`` does."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="what builds the site comes with `make docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    assert (tmp_path / "guide.html").exists()


def test_every_error_says_what_to_do() -> None:
    page = generate.errors_page()
    for name, value in vars(errors).items():
        if isinstance(value, type) and name not in ("GradAccumError", "GradAccumWarning"):
            assert re.search(rf"^### {name}\n\n.+\n\n\*\*What to do:\*\* \S", page, re.MULTILINE), name


def parts(text: str) -> tuple[list[str], list[int], int]:
    """Code, the levels of headings, and the number of lines in tables."""
    headings = re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE)
    return [match[0] for match in FENCE.finditer(text)], list(map(len, headings)), len(re.findall(r"(?m)^\|", text))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("zh/")])
def test_chinese_pages_have_the_code_and_the_sections_of_the_english_ones(page: str) -> None:
    texts = [(DOCS / name).read_text(encoding="utf-8") for name in (page, page.removeprefix("zh/"))]
    code, headings, rows = zip(*map(parts, texts), strict=True)
    assert code[0] == code[1]
    assert headings[0] == headings[1]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[guide](guide.md#gans)", "[guide](guide.md#gans)"),
        ("[a site](https://example.org)", "[a site](https://example.org)"),
        ("[examples](../examples/README.md)", "examples (`examples/README.md`)"),
        ("[`examples/04_gan.py`](../examples/04_gan.py)", "`examples/04_gan.py`"),
        ("![picture](images/demo.png)", "![picture](images/demo.png)"),
        ("<!-- run first\nx = 1\n-->\nText", "Text"),
        ("<!-- not run: why -->\nText", "Text"),
    ],
)
def test_what_leads_out_of_the_site(link: str, becomes: str) -> None:
    page = type("Page", (), {"file": type("File", (), {"src_uri": "start.md"})})
    assert script("hooks").on_page_markdown(link, page=page) == becomes
