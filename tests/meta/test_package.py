"""What the project says of itself in several places is the same in all of them."""

import re
from pathlib import Path

import gradaccum as ga

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_one_version_and_one_licence() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', PROJECT, re.MULTILINE)
    (licence,) = re.findall(r'^license = "(.+)"$', PROJECT, re.MULTILINE)
    assert version == ga.__version__
    assert f"\nversion: {version}\n" in citation
    assert f"\nlicense: {licence}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE)


def test_the_workflow_runs_what_has_to_pass_on_every_python_that_is_stated() -> None:
    stated = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    (run_on,) = re.findall(r"^ +python: \[(.+)\]$", WORKFLOW, re.MULTILINE)
    assert set(stated) <= set(re.findall(r"3\.\d+", run_on))
    assert "- run: .ci/run" in WORKFLOW
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', PROJECT)
    assert f'torch: "{oldest}.*"' in WORKFLOW


def test_types_are_checked_in_the_examples_too() -> None:
    assert re.search(r'^include = \["src", "examples"\]$', PROJECT, re.MULTILINE)


def test_what_builds_the_documentation_is_pinned() -> None:
    (extra,) = re.findall(r"^docs = \[(.+)\]$", PROJECT, re.MULTILINE)
    for name in re.findall(r'"([\w-]+)', extra):
        assert re.search(rf"^{name}==", CONSTRAINTS, re.MULTILINE), name


def test_no_message_names_an_index_that_the_package_is_not_on() -> None:
    if "[project.urls]" in PROJECT:
        return
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("README*.md")]
    found = [path.name for path in files if re.search(r"pip install ['\"]?gradaccum", path.read_text(encoding="utf-8"))]
    assert not found
