"""Progress of uploads on a terminal; silent where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cpodfs.words import count, size


class _Speed(ProgressColumn):
    """In the units that everything else has."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{size(int(speed))}/s", style="progress.data.speed")


@contextmanager
def drain_progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes ``status`` reports and shows changes and bytes left, rate and ETA."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        _Speed(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task("uploading", total=None)
    most = 0
    started = False

    def show(status: dict[str, Any]) -> None:
        nonlocal most, started
        left = max(0, status["bytes"] - sum(u["sent"] for u in status["uploads"]))
        most = max(most, left)
        changes = status["pending"] + status["deletions"]
        if not changes:
            return
        if not started:
            started = True
            bar.start()
        bar.update(
            task,
            description=f"{count(changes, 'change')} left",
            total=most or None,
            completed=most - left,
        )

    try:
        yield show
    finally:
        if started:
            bar.stop()
