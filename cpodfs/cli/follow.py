"""A run's logs as they grow, and where they are.

Imports recipes, `pods` and `keep`. Polls: what is new is printed within `POLL_S`, whoever wrote it.
The driver's ``.run`` says whether the run goes on, and the logs are complete before that is gone.
Programs can write in the pod: below it no link is followed, and a record may say anything.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cpodfs.cli.pods import Pod
from cpodfs.cli.shown import Passed, say
from cpodfs.errors import RecipeError, RunError
from cpodfs.runs.keep import open_folder
from cpodfs.words import cost, line

POLL_S = 0.05
LOOKS = 40
RUN_ID = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{4}", re.ASCII)
_PROGRESS_S = 0.5
_CHUNK_BYTES = 256 * 1024
_RECORD_LIMIT_BYTES = 16 << 20
_RECORD_LEVELS = 16


def log_folder(pod: Pod) -> str:
    """Where in the pod its runs have their folders; the usual place when the recipe is broken."""
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
    return logs


def run_ids(pod: Pod, logs: str) -> list[str]:
    """The runs with a folder in the pod's folder ``logs``, the newest first. Raises RunError."""
    try:
        with _open(pod, logs) as folder:
            return sorted((n for n in os.listdir(folder) if RUN_ID.fullmatch(n)), reverse=True)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise RunError(f"{pod.name}: {logs}: no folder, or a link, which is not followed") from None


def read_record(pod: Pod, folder: str) -> dict[str, Any]:
    """The ``run.json`` in a run's folder; empty when there is none that can be read (or printed)."""
    try:
        with _open(pod, folder, "run.json") as fd, open(fd, "rb", closefd=False) as file:
            record = json.loads(file.read(_RECORD_LIMIT_BYTES))
        if not isinstance(record, dict) or not _is_flat(record, _RECORD_LEVELS):
            return {}
        # Infinity and NaN are no JSON, but Python reads them.
        json.dumps(record, allow_nan=False)
    except (OSError, ValueError, RecursionError):
        return {}
    return record


def _is_flat(value: Any, levels: int) -> bool:
    """Whether nothing in a value is so deep that others could not cope."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner)


@contextmanager
def _open(pod: Pod, folder: str, name: str | None = None) -> Iterator[int]:
    """An fd of a folder in the pod, or of a file there. Raises OSError, NotADirectoryError or ELOOP
    among others for a link."""
    fd = open_folder(str(pod.path), folder.split("/"))
    try:
        if name is None:
            yield fd
            return
        # Whatever took the file's place, the opening does not wait.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=fd)
        try:
            yield file
        finally:
            os.close(file)
    finally:
        os.close(fd)


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
    """Copies what a run's two logs gain to our standard output and error. ``folder``: the run's, in
    the pod. ``refused``: a link has taken the place of one of them, or of a folder on the way."""

    def __init__(
        self, pod: Pod, folder: str, before_output: Callable[[], None] = lambda: None
    ) -> None:
        self.refused = False
        self._before_output = before_output
        self._streams = [
            _Stream(pod, folder, "stdout.log", Passed(sys.stdout)),
            _Stream(pod, folder, "stderr.log", Passed(sys.stderr)),
        ]

    def step(self) -> None:
        """Print what is new. What is refused is complained of once."""
        for stream in self._streams:
            try:
                while data := stream.new():
                    self._before_output()
                    stream.target.write(data)
            except _Refused as refused:
                if not self.refused:
                    self._before_output()
                    say(f"cpodfs: {refused}", err=True)
                self.refused = True

    def end(self) -> None:
        """Nothing new will be asked for."""
        for stream in self._streams:
            stream.target.end()


class _Refused(Exception):
    """Something that is no log; says what it is."""


class _Stream:
    def __init__(self, pod: Pod, folder: str, name: str, target: Passed) -> None:
        self.target = target
        self._place = (pod, folder, name)
        self._path = pod.path / folder / name
        self._offset = 0

    def new(self) -> bytes:
        """The next bytes, if any. Raises _Refused."""
        try:
            # Opened each time: the copy may have been deleted, and begun again.
            with _open(*self._place) as fd:
                if os.fstat(fd).st_size <= self._offset:
                    return b""
                data = os.pread(fd, _CHUNK_BYTES, self._offset)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _Refused(f"{self._path}: is a link, which is not followed") from None
            if error.errno == errno.ENOTDIR:
                raise _Refused(f"{self._path}: a folder on the way is a link, or none") from None
            return b""
        self._offset += len(data)
        return data


def follow(pod: Pod, run: str, folder: str) -> Logs:
    """Print a run's logs until it ends; a line below them, on a terminal, says how it goes."""
    progress = ProgressLine()
    logs = Logs(pod, folder, progress.clear)
    while True:
        state = in_progress(pod)
        logs.step()
        if state is None or state.get("id") != run:
            # Once more: the end came after the look at `.run`, the last words before it.
            logs.step()
            progress.clear()
            logs.end()
            return logs
        progress.show(state)
        time.sleep(POLL_S)


def _in_words(state: dict[str, Any], seconds: int) -> str:
    words = f"{state.get('pod')}: {state.get('state')} {seconds // 60}:{seconds % 60:02d}"
    golem = state.get("golem")
    if not isinstance(golem, dict):
        return line(words)
    tasks = golem.get("tasks")
    counts = tasks.items() if isinstance(tasks, dict) else ()
    words += "".join(f", {value} {key}" for key, value in counts if value)
    of = "" if golem.get("budget") is None else f" of {cost(golem['budget'])}"
    return line(f"{words}, {cost(golem.get('spent'))}{of} GLM spent")


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
