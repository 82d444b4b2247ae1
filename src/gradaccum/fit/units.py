"""Bytes as people write them."""

from __future__ import annotations

import re

from gradaccum.errors import WindowError

_UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def as_bytes(size: str | int) -> int:
    """A size in bytes, from a number of them or from text such as "24GiB", "24 GB", "512MiB".

    Raises:
        WindowError: it is not a size, or not above 0.

    Example:
        >>> as_bytes("24GiB"), as_bytes("1.5 kB"), as_bytes(4096)
        (25769803776, 1500, 4096)
    """
    found = None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].lower(), 0) if match else 0  # none at all is more often a slip than bytes
        found = round(float(match[1]) * unit) if match else None
    elif isinstance(size, int) and not isinstance(size, bool):
        found = size
    if found is None or found <= 0:
        raise WindowError(
            f"memory={size!r} is no size, so nothing can be said to fit into it. Write a number with its unit, "
            "'24GiB' (2**30 bytes each) or '24GB' (10**9), or pass an int: the number of bytes."
        )
    return found


def in_words(num_bytes: float) -> str:
    """Bytes with three digits and a binary unit.

    Example:
        >>> in_words(512), in_words(25_769_803_776), in_words(1_300_000)
        ('512 B', '24 GiB', '1.24 MiB')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB" if size < 999.5 else f"{size:,.0f} TiB"
