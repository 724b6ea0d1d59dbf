"""Whether agreements fail alike, one after another: money spent on nothing, which nobody notices.

Standard library only. Fed by `gateway_books` with batches as they were sent and with what yagna
said of them, by results or by events of their stream; knows no HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MANY = 10
"""So many agreements in a row are worth a warning in any case."""
FEW, FEW_AFTER_S = 3, 30.0
"""So many are as long as none has ever done anything, once the first is so long ago."""
_SAID_CHARS = 200
_VARIABLE = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8,}|\d+", re.IGNORECASE)
"""What differs from one provider to the next in what is the same failure: ids, ports, times."""


@dataclass
class _Batch:
    agreement: str
    commands: int
    works: bool
    """Whether it has a command that runs something: to be deployed is not yet to work."""
    stderr: str = ""


class Failures:
    """The agreements of one run, by how the first batch that counts ended. ``clock``: seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._batches: dict[str, _Batch] = {}
        self._judged: set[str] = set()
        self._worked = False
        self._kind = ""
        self._said = ""
        self._since = 0.0
        self.streak = 0
        """How many agreements in a row, up to the last one, failed alike."""

    def sent(self, agreement: str, batch: str, text: Any) -> None:
        """A batch was sent; ``text``: its commands, as JSON."""
        if agreement in self._judged:
            return
        try:
            commands = json.loads(text)
            works = any("run" in command for command in commands)
            self._batches[batch] = _Batch(agreement, len(commands), works)
        except (TypeError, ValueError):
            return

    def results(self, batch: str, results: Any) -> None:
        """What yagna said of a batch when it was asked for results."""
        if batch not in self._batches or not isinstance(results, list):
            return
        for result in results:
            if not isinstance(result, dict):
                continue
            if result.get("result") == "Error":
                self._failed(batch, result.get("stderr"), result.get("message"))
                return
            if result.get("isBatchFinished") is True:
                self._finished(batch)
                return

    def event(self, batch: str, event: Any) -> None:
        """An event of a batch's stream."""
        known = self._batches.get(batch)
        if known is None or not isinstance(event, dict) or not isinstance(event.get("kind"), dict):
            return
        kind = event["kind"]
        if isinstance(kind.get("stderr"), str):
            known.stderr = (known.stderr + kind["stderr"])[-4 * _SAID_CHARS :]
        finished = kind.get("finished")
        if not isinstance(finished, dict):
            return
        if finished.get("return_code"):
            self._failed(batch, known.stderr, finished.get("message"))
        elif event.get("index") == known.commands - 1:
            self._finished(batch)

    def warning(self) -> str | None:
        """What the user should know, in one line; None as long as there is nothing."""
        few = self.streak >= FEW and not self._worked
        if self.streak < MANY and not (few and self._clock() >= self._since + FEW_AFTER_S):
            return None
        return self.sentence()

    def sentence(self) -> str:
        """The failure, and how many times in a row."""
        return f"the first batch of {self.streak} agreements in a row failed alike: {self._said}"

    def _finished(self, batch: str) -> None:
        known = self._batches.pop(batch)
        if known.works and known.agreement not in self._judged:
            self._judged.add(known.agreement)
            self._worked, self.streak, self._kind = True, 0, ""

    def _failed(self, batch: str, stderr: Any, message: Any) -> None:
        known = self._batches.pop(batch)
        if known.agreement in self._judged:
            return
        self._judged.add(known.agreement)
        said = _said(stderr, message)
        kind = _VARIABLE.sub("#", said)
        if kind != self._kind:
            self._kind, self.streak, self._since = kind, 0, self._clock()
        self._said = said
        self.streak += 1


def _said(stderr: Any, message: Any) -> str:
    """A failure in a line: the last line of stderr, else the exe-unit's message."""
    for text in (stderr, message):
        lines = str(text or "").split("\n")
        if last := next((line.strip() for line in reversed(lines) if line.strip()), ""):
            return "".join(c if c.isprintable() else "?" for c in last[:_SAID_CHARS])
    return "no reason given"
