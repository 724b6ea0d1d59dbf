"""What the benches share: one table in reStructuredText, ready for README.rst. A leaf."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)
) -> str:
    """A simple table; the columns ``text`` are flushed left, the others right."""
    everything = [header, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    rule = "  ".join("=" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column in text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([rule, line(header), rule, *map(line, rows), rule])


def machine() -> str:
    """On what these figures were taken, and how busy it was."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, Linux {platform.release()}, load {load:.1f} before the start"
