import pytest

import gradaccum as ga
from gradaccum.fit.units import as_bytes, in_words


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("24 gib", 24 * 2**30), (" 1.5 MiB ", 3 * 2**19),
        ("512KiB", 2**19), ("7B", 7), ("2TiB", 2**41), ("1kB", 1000), (12345, 12345),
    ],
)  # fmt: skip
def test_sizes(size: str | int, expected: int) -> None:
    assert as_bytes(size) == expected


@pytest.mark.parametrize("size", ["24", "24G", "GiB", "", "24 GiB left", "-1GiB", "0GiB", 0, -5, True, 1.5, None])
def test_what_is_no_size(size: object) -> None:
    with pytest.raises(ga.WindowError, match=r"is no size.*'24GiB' \(2\*\*30 bytes each\) or '24GB'"):
        as_bytes(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (999 * 2**10, "999 KiB"),
        (24 * 2**30, "24 GiB"), (123_456_789, "118 MiB"), (5 * 2**40, "5 TiB"), (5000 * 2**40, "5,000 TiB"),
    ],
)  # fmt: skip
def test_words(num_bytes: int, expected: str) -> None:
    assert in_words(num_bytes) == expected
