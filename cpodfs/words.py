"""Numbers as people read them, and text that is not ours as they may be shown it. A leaf."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal

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


COST_DIGITS = 4
"""More of a cost tell nobody anything, and look as if it were known better than it is."""


def cost(amount: object) -> str:
    """An amount of GLM with `COST_DIGITS` significant digits at most and no exponent, else nothing."""
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not math.isfinite(amount):
        return ""
    return f"{Decimal(f'{amount:.{COST_DIGITS}g}'):f}"


def printable(text: str) -> str:
    """Text of a stranger's, safe for a terminal: nothing but its lines can have an effect. Controls,
    what changes the direction of writing, and lone surrogates are written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def line(text: str) -> str:
    """`printable` text that stays in its line."""
    return printable(text).replace("\n", "\\n")


def name(path: str) -> str:
    """A file's name, in quotes unless it is a plain one: it must not look like what follows it."""
    # However wide the terminal: spaces must not put what stands behind them into the next line.
    shown = re.sub(" {2,}", lambda spaces: "\\x20" * len(spaces[0]), line(path))
    return shown if re.fullmatch(r"[\w@%+=:,./-]+", shown) else f"'{shown}'"


def some(paths: Sequence[str], limit: int = 3) -> str:
    """The first names of a list: ``a, b, c and 4 more``."""
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(name(path[:200]) for path in paths[:limit]) + more
