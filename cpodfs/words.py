"""Numbers as people read them. A leaf."""

from __future__ import annotations

from rich.filesize import pick_unit_and_suffix

_UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]


def size(number: int) -> str:
    """A number of bytes: ``300 bytes``, ``1.5 MiB``. The units are those of ``--cache-size``."""
    if number == 1:
        return "1 byte"
    unit, suffix = pick_unit_and_suffix(number, _UNITS, 1024)
    return f"{number} {suffix}" if unit == 1 else f"{number / unit:,.1f} {suffix}"


def count(number: int, thing: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
