"""Checkpoint files are there whole or not at all, and it shows when one has changed since it was written.

A new file is written under another name, forced to the disk, and renamed. A rename within one folder is atomic on POSIX
systems, and forcing the folder makes it last. The name carries the SHA-256 of the content, so a file that was cut short
or has changed by one bit no longer agrees with its name, and no second file has to be kept in step with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"update-(\d{9,})-([0-9a-f]{32})(\.pt)?")
_PARTIAL = "partial-"  # torch.save refuses names that begin with a dot


def write(folder: Path, updates: int, fill: Callable[[Path], None]) -> Path:
    """Writes the checkpoint after so many updates and returns its path; ``fill`` writes a file, or a folder of them."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_PARTIAL}{updates:09d}-{os.getpid()}"
    remove(partial)
    try:
        fill(partial)
        return publish(partial, updates)
    except BaseException:
        remove(partial)
        raise


def partial_path(folder: Path, updates: int) -> Path:
    """Returns the path to which several processes together write one checkpoint."""
    return folder / f"{_PARTIAL}{updates:09d}-shared"


def publish(partial: Path, updates: int) -> Path:
    """Forces what was written to the disk, renames it to its final name, and returns that path."""
    folder = partial.parent
    for file in _files_in(partial):
        _force(file)
    if partial.is_dir():
        _force(partial)
    final = folder / f"update-{updates:09d}-{digest(partial)}{'' if partial.is_dir() else '.pt'}"
    if final.exists():  # the same content, saved again
        remove(partial)
    else:
        os.replace(partial, final)
    _force(folder)
    return final


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, whole or not, by updates and time."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (int(path.name.split("-")[1]), path.stat().st_mtime_ns), reverse=True)


def is_whole(path: Path) -> bool:
    """Returns whether the content is what it was when it was written."""
    match = _NAME.fullmatch(path.name)
    try:
        return match is not None and digest(path) == match[2]
    except OSError:
        return False


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the newest ``count`` checkpoints, and what killed processes have left half-written."""
    for path in newest_first(folder)[count:]:
        remove(path)
    for path in folder.glob(f"{_PARTIAL}*"):
        remove(path)
    _force(folder)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Returns half of the SHA-256 of a file, or of a folder's files and their names."""
    total = hashlib.sha256()
    for file in _files_in(path):
        if path.is_dir():
            total.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                total.update(block)
    return total.hexdigest()[:32]


def _files_in(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some network file systems cannot force a folder
            raise
    finally:
        os.close(descriptor)
