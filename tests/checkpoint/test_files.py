"""Checkpoints are there whole or not at all."""

from pathlib import Path

import pytest

from gradaccum.checkpoint import files


def write(folder: Path, updates: int, content: bytes) -> Path:
    return files.write(folder, updates, lambda partial: partial.write_bytes(content))


def test_cut_short_at_any_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3
    path = write(tmp_path, 1, content)
    assert files.is_whole(path)
    changed = [content[:7] + bytes([content[7] ^ 1]) + content[8:], content + b"\0"]
    for other in [*(content[:length] for length in range(len(content))), *changed]:
        path.write_bytes(other)
        assert not files.is_whole(path)
    path.write_bytes(content)
    assert files.is_whole(path)


def test_the_newest_stay(tmp_path: Path) -> None:
    paths = [write(tmp_path, updates, b"%d" % updates) for updates in (9, 10, 1_000_000_000, 11)]
    assert files.newest_first(tmp_path) == [paths[2], paths[3], paths[1], paths[0]]
    (tmp_path / "partial-000000012-99999999").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    files.keep_newest(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == sorted([paths[2], paths[3], tmp_path / "notes.txt"])


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path) -> None:
    def fill(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError("the disk is full")

    before = write(tmp_path, 1, b"whole")
    with pytest.raises(OSError, match="the disk is full"):
        files.write(tmp_path, 2, fill)
    assert list(tmp_path.iterdir()) == [before]


def test_a_folder_is_one_checkpoint(tmp_path: Path) -> None:
    def fill(partial: Path) -> None:
        partial.mkdir()
        (partial / "a").write_bytes(b"1")
        (partial / "b").write_bytes(b"2")

    path = files.write(tmp_path, 1, fill)
    assert files.is_whole(path)
    (path / "b").rename(path / "c")
    assert not files.is_whole(path)
    (path / "c").unlink()
    assert not files.is_whole(path)


def test_saved_twice(tmp_path: Path) -> None:
    assert write(tmp_path, 1, b"same") == write(tmp_path, 1, b"same")
    assert len(list(tmp_path.iterdir())) == 1
