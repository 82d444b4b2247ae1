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
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gradaccum.sync.faults import Whereabouts

_NAME = re.compile(r"update-(\d{9,})-([0-9a-f]{32})(\.pt)?")
_PARTIAL = re.compile(r"partial-\d{9,}-(\d+)(?:-(.+))?")
_ASIDE = "aside-"


def write(folder: Path, updates: int, fill: Callable[[Path], None]) -> Path:
    """Writes the checkpoint after so many updates and returns its path; ``fill`` writes a file, or a folder of them."""
    partial = partial_path(folder, updates)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove(partial)
        fill(partial)
        return publish(partial, updates, digests(partial))
    except BaseException:
        remove(partial)
        raise


def partial_path(folder: Path, updates: int) -> Path:
    """Returns the path under which this process writes a checkpoint that is not whole yet.

    ``torch.save`` refuses names that begin with a dot.
    """
    return folder / f"partial-{updates:09d}-{os.getpid()}-{socket.gethostname()}"


def publish(partial: Path, updates: int, files: Mapping[str, str]) -> Path:
    """Forces what was written to the disk, renames it to its final name, and returns that path.

    Args:
        partial: what was written.
        updates: see `write`.
        files: the digests of its files, all of them; see `digests`.
    """
    folder = partial.parent
    for file in _files_in(partial):
        _force(file)
    if partial.is_dir():
        _force(partial)
    final = folder / f"update-{updates:09d}-{_combined(files)}{'' if partial.is_dir() else '.pt'}"
    if final.is_dir():  # the same content, saved again; it may have been torn since, and a folder is not replaced
        remove(final)
    os.replace(partial, final)
    _force(folder)
    return final


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, whole or not, by updates and time."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (updates_of(path), path.stat().st_mtime_ns), reverse=True)


def updates_of(path: Path) -> int:
    """Returns after how many updates a checkpoint was saved."""
    return int(path.name.split("-")[1])


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path has the name of a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def is_whole(path: Path, files: Mapping[str, str] | None = None) -> bool:
    """Returns whether the content is what it was when it was written; ``files`` are its `digests`, if known."""
    match = _NAME.fullmatch(path.name)
    try:
        return match is not None and _combined(digests(path) if files is None else files) == match[2]
    except OSError:
        return False


def keep_newest(folder: Path, count: int, *, every: int | None = None, just_saved: Path | None = None) -> None:
    """Removes old checkpoints, and what ended processes of this machine have left half-written.

    Args:
        folder: where they are.
        count: how many of the newest stay.
        every: of each so many updates the first checkpoint stays for good.
        just_saved: one that stays in any case.
    """
    paths = newest_first(folder)
    first_of = {updates_of(path) // every: path for path in paths} if every is not None else {}
    stays = {*paths[:count], just_saved, *(path for period, path in first_of.items() if period)}
    for path in paths:
        if path not in stays:
            remove(path)
    for path in folder.glob("partial-*"):
        match = _PARTIAL.fullmatch(path.name)
        if match is not None and Whereabouts(match[2] or socket.gethostname(), int(match[1])).is_gone():
            remove(path)
    _force(folder)


def set_aside(paths: Iterable[Path]) -> None:
    """Renames checkpoints so that they are neither loaded nor removed any more."""
    for path in paths:
        os.replace(path, path.with_name(f"{_ASIDE}{path.name}"))


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)


def digests(path: Path, *, part: int = 0, parts: int = 1) -> dict[str, str]:
    """Returns the SHA-256 of a checkpoint's files, by their names within it.

    Args:
        path: one file, or a folder of them.
        part: which files: of each ``parts`` in the order of names the one with this number. Processes that each read
            their part make the sum of a large checkpoint together.
        parts: see there.
    """
    found: dict[str, str] = {}
    for file in _files_in(path)[part::parts]:
        total = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                total.update(block)
        found[file.relative_to(path).as_posix()] = total.hexdigest()
    return found


def _combined(files: Mapping[str, str]) -> str:
    """Half of the SHA-256 of a single file; of a folder that of its files' names and sums."""
    if set(files) == {"."}:
        return files["."][:32]
    return hashlib.sha256("".join(f"{name}\0{files[name]}\0" for name in sorted(files)).encode()).hexdigest()[:32]


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
