"""No file of the project knows the machine it was written on."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each in two halves: this file is read as well.
PLACES = ("../" + "shared", "/" + "work/", "/" + "root/")


def mentions(root: Path, files: list[str]) -> list[str]:
    """`file:line: place` for each line of a text file that names one of `PLACES`."""
    found: list[str] = []
    for name in files:
        try:
            lines = (root / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; or removed, but not yet from the index
            continue
        found += [f"{name}:{n}: {place}" for n, line in enumerate(lines, 1) for place in PLACES if place in line]
    return found


def committable(root: Path) -> list[str]:
    """What is tracked, and what would be with `git add --all`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


def test_no_place_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    assert mentions(ROOT, committable(ROOT)) == []


def test_the_leak_guard(tmp_path: Path) -> None:
    (tmp_path / "fine.md").write_text("a network/worker, shared by all, at the root\n", encoding="utf-8")
    (tmp_path / "bad.md").write_text("fine\nsee " + "".join(PLACES) + "\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    files = ["fine.md", "bad.md", "picture.png", "gone.md"]
    assert mentions(tmp_path, files) == [f"bad.md:2: {place}" for place in PLACES]
