"""A run's logs as they grow, and where they are.

Imports recipes and `pods`. Polls: what is new is printed within `POLL_S`, whoever wrote it. The
driver's ``.run`` says whether the run goes on, and the logs are complete before that is gone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpodfs.cli.pods import Pod, printable
from cpodfs.errors import RecipeError

POLL_S = 0.05
LOOKS = 40
RUN_ID = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{4}")
_PROGRESS_S = 0.5
_CHUNK_BYTES = 256 * 1024
_RECORD_LIMIT_BYTES = 16 << 20


def log_folder(pod: Pod) -> Path:
    """The folder in which the pod's runs have theirs; the usual one when the recipe is broken."""
    # Here: it imports much, which the other commands need not wait for.
    from cpodfs.recipe import RECIPE_LIMIT_BYTES, choose_recipe, parse_recipe

    name = choose_recipe(os.listdir(pod.path))
    logs = "logs"
    if name is not None:
        try:
            with (pod.path / name).open("rb") as file:
                logs = parse_recipe(file.read(RECIPE_LIMIT_BYTES + 1), file=name).log
        except (OSError, RecipeError):
            pass
    return pod.path / logs


def run_ids(folder: Path) -> list[str]:
    """The runs with a folder here, the newest first."""
    try:
        return sorted((n for n in os.listdir(folder) if RUN_ID.fullmatch(n)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_record(folder: Path) -> dict[str, Any]:
    """The ``run.json`` in a run's folder; empty when there is none that can be read."""
    try:
        with (folder / "run.json").open("rb") as file:
            record = json.loads(file.read(_RECORD_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def in_progress(pod: Pod) -> dict[str, Any] | None:
    """What ``.run`` says, or None when there is no run (or no mount) any more."""
    for _ in range(LOOKS):
        try:
            state = json.loads(pod.control.read_bytes())
            return state if isinstance(state, dict) else None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENOTCONN):
                return None
            # ESTALE, EIO: it was taken away between the kernel's look and the opening.
        except ValueError:
            pass
        time.sleep(POLL_S)
    return None


class Logs:
    """Copies what a run's two logs gain to our standard output and error."""

    def __init__(self, folder: Path, before_output: Callable[[], None] = lambda: None) -> None:
        self._before_output = before_output
        self._streams = [
            _Stream(folder / "stdout.log", sys.stdout.buffer),
            _Stream(folder / "stderr.log", sys.stderr.buffer),
        ]

    def step(self) -> None:
        """Print what is new."""
        for stream in self._streams:
            while data := stream.new():
                self._before_output()
                stream.target.write(data)
                stream.target.flush()


class _Stream:
    def __init__(self, path: Path, target: Any) -> None:
        self.target = target
        self._path = path
        self._offset = 0

    def new(self) -> bytes:
        # Opened each time: the copy may have been deleted, and begun again.
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            if os.fstat(fd).st_size <= self._offset:
                return b""
            data = os.pread(fd, _CHUNK_BYTES, self._offset)
        except OSError:
            return b""
        finally:
            os.close(fd)
        self._offset += len(data)
        return data


def follow(pod: Pod, run: str, folder: Path) -> None:
    """Print a run's logs until it ends; a line below them, on a terminal, says how it goes."""
    line = ProgressLine()
    logs = Logs(folder, line.clear)
    while True:
        state = in_progress(pod)
        logs.step()
        if state is None or state.get("id") != run:
            # Once more: the end came after the look at `.run`, the last words before it.
            logs.step()
            line.clear()
            return
        line.show(state)
        time.sleep(POLL_S)


def _in_words(state: dict[str, Any], seconds: int) -> str:
    words = f"{state.get('pod')}: {state.get('state')} {seconds // 60}:{seconds % 60:02d}"
    golem = state.get("golem")
    if not isinstance(golem, dict):
        return printable(words)
    tasks = golem.get("tasks")
    counts = tasks.items() if isinstance(tasks, dict) else ()
    words += "".join(f", {value} {key}" for key, value in counts if value)
    return printable(f"{words}, {golem.get('spent')} of {golem.get('budget')} GLM spent")


class ProgressLine:
    """One line on stderr that comes and goes; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._begun = time.monotonic()
        self._shown_at: float | None = None

    def show(self, state: dict[str, Any]) -> None:
        now = time.monotonic()
        if not self._is_terminal or (self._shown_at and now - self._shown_at < _PROGRESS_S):
            return
        self._shown_at = now
        text = _in_words(state, int(now - self._begun))
        sys.stderr.write(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._shown_at is not None:
            self._shown_at = None
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
