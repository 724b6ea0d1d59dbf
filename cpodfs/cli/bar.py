"""The bar that shows uploads on a terminal.

Imports words and rich. Nothing is drawn before there is something to upload.
"""

from __future__ import annotations

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


class Bar:
    """On standard error."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            _Speed(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("uploading", total=None)
        self._most = 0
        self._started = False

    def show(self, status: dict[str, Any]) -> None:
        """Of a report of the driver's: changes and bytes left, rate and ETA."""
        left = max(0, status["bytes"] - sum(u["sent"] for u in status["uploads"]))
        self._most = max(self._most, left)
        changes = status["pending"] + status["deletions"]
        if not changes:
            return
        if not self._started:
            self._started = True
            self._bar.start()
        self._bar.update(
            self._task,
            description=f"{count(changes, 'change')} left",
            total=self._most or None,
            completed=self._most - left,
        )

    def stop(self) -> None:
        """Nothing of it stays on the terminal."""
        if self._started:
            self._bar.stop()
