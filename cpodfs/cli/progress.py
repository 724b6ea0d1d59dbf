"""Progress of uploads on a terminal; silent where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def drain_progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes ``status`` reports and shows changes and bytes left, rate and ETA."""
    if not sys.stderr.isatty():
        yield lambda _status: None
        return
    from cpodfs.cli.bar import Bar  # here: with rich, for which nobody waits who does not see it

    bar = Bar()
    try:
        yield bar.show
    finally:
        bar.stop()
