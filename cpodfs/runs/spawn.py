"""How supervisors are started, and which environment they and the programs get.

Imports `sandbox`, limits and the package's place. What is not named here does not reach a program:
the driver's own environment may hold passwords.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpodfs
from cpodfs.limits import SOFT_AT_START
from cpodfs.runs import sandbox

_PASSED = ("HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR")


@dataclass(frozen=True)
class How:
    """What is special about one run. ``env``: more variables for the program. ``changes``: the
    settings that the user changed for it, for the record. ``sandbox``: bwrap's path, or None."""

    env: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    sandbox: str | None = None


AS_EVER = How()


def program_start(
    how: How, pod: Path, extra: Mapping[str, str], ours: Mapping[str, str]
) -> dict[str, Any]:
    """The part of a supervisor's job that says how the program is started: env, wrap, open_files."""
    env = run_environment({**extra, **how.env}, ours)
    if how.sandbox is None:
        return {"env": env, "wrap": [], "open_files": SOFT_AT_START}
    inside = sandbox.environment(env)
    wrap = sandbox.wrapper(how.sandbox, pod, inside)
    return {"env": inside, "wrap": wrap, "open_files": SOFT_AT_START}


def run_environment(extra: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """A program's environment: a few variables of ``ours`` (the driver's), then ``extra``.

    PATH is extra's PATH, the folder of this Python (so that ``python3`` finds yapapi), our PATH.
    CPODFS_* are added by the supervisor.
    """
    # Not resolved: in a virtual environment the link's place is what makes it one.
    python = os.path.dirname(os.path.abspath(sys.executable))
    path = [extra.get("PATH", ""), python, ours.get("PATH") or os.defpath]
    return {
        **_passed(ours),
        "TERM": "dumb",
        # Bytecode would be uploaded into the pod; buffered output would appear late.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        **extra,
        "PATH": os.pathsep.join(part for part in path if part),
    }


def supervisor_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The supervisor's own environment: no secrets, and where to import cpodfs from."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(cpodfs.__file__)))
    return {**_passed(ours), "PATH": ours.get("PATH") or os.defpath, "PYTHONPATH": package}


def supervisor_command(folder: Path, lock: int, publish: list[str]) -> list[str]:
    """argv of a supervisor for a run's folder; ``publish``: mount point and seconds, or empty."""
    mode = ["--publish"] if publish else []
    # -S: it imports only the standard library and us, and `site` takes longer than all of that.
    python = [sys.executable, "-S", "-P", "-m", "cpodfs.runs.supervisor"]
    return [*python, *mode, str(folder), str(lock), *publish]


def _passed(ours: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in ours.items() if k in _PASSED or k.startswith("LC_")}
