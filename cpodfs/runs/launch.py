"""Processes that the driver starts for a run: its supervisor, and what tidies up in its stead.

Imports `state`, `spawn` and `provider_link`; trio. Used by `manager` only, which holds the run's
lock; the supervisor inherits it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from cpodfs.runs import state
from cpodfs.runs.provider_link import clean_up
from cpodfs.runs.spawn import run_environment, supervisor_command, supervisor_environment

if TYPE_CHECKING:
    from cpodfs.runs.state import Record

log = logging.getLogger(__name__)


async def open_supervisor(folder: Path, lock: int, publish: list[str]) -> trio.Process:
    """Start a supervisor for a run's folder; ``publish``: see `spawn.supervisor_command`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    words = os.open(folder / "supervisor.log", flags, 0o600)
    try:
        pipe = subprocess.DEVNULL if publish else subprocess.PIPE
        return await trio.lowlevel.open_process(
            supervisor_command(folder, lock, publish),
            stdin=pipe,
            stdout=pipe,
            stderr=words,
            pass_fds=[lock],
            start_new_session=True,
            cwd="/",
            env=supervisor_environment(os.environ),
        )
    finally:
        os.close(words)


async def hand_over(process: trio.Process, job: dict[str, Any]) -> None:
    """Send the job, wait until the supervisor listens to signals (or is dead)."""

    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await process.stdin.send_all(json.dumps(job).encode())
        await process.stdin.aclose()
        await process.stdout.receive_some(16)
    except trio.BrokenResourceError:
        # It died; that the record has no end says so.
        log.warning("supervisor died at its start pid=%d", process.pid)
    finally:
        await process.stdin.aclose()
        await process.stdout.aclose()


def pidfd_of_child(process: trio.Process) -> int | None:
    """A pidfd of a process that nobody has waited for; None when it is dead already."""
    # Not reaped before process.wait(), so the pid is surely its own.
    try:
        return os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None


def end_agreements(
    folder: Path, record: Record, extra: Mapping[str, str], *, last: bool = False
) -> None:
    """End and pay what a provider run left at the market, as its supervisor would have.

    Brings the record's ``golem`` up to date and does not write it. ``extra``: what runs get to see.
    ``last``: see `clean_up`.
    Blocks, for `provider_link.GRACE_S` at most. Raises OSError, or KeyError for half a record.
    """
    env = run_environment(extra, os.environ)
    ours = supervisor_environment(os.environ)["PYTHONPATH"]
    env["PYTHONPATH"] = os.pathsep.join(p for p in (env.get("PYTHONPATH"), ours) if p)
    with open(folder / state.STREAMS[1], "ab", buffering=0) as words:
        clean_up(record["golem"], env, words.fileno(), last=last, until=record["ended"])
