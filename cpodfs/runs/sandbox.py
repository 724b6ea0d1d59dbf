"""Runs behind bubblewrap: only the pod can be written, only the system and Python can be read.

Imports `box` and the package's place. The network stays the machine's, for the program
talks to yagna on localhost. Secrets reach the program by inheriting the environment: bwrap's
arguments, which every user of the machine can read, name paths only.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import cpodfs
from cpodfs.errors import NotNow
from cpodfs.runs import box

MODES = ("auto", "on", "off")
PROBE_S = 10.0
_UNTOLD = "it cannot be told whether bwrap works"
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_TMP = "/tmp"  # noqa: S108 -- inside it is a private one
_HOME = f"{_TMP}/home"

_ISOLATION = (
    *("--unshare-user-try", "--unshare-pid", "--unshare-ipc", "--unshare-uts"),
    *("--unshare-cgroup-try", "--cap-drop", "ALL"),
)
_MERGED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SYSTEM = ("/usr", "/opt", "/nix/store", "/run/systemd/resolve")
_ETC = (
    *("alternatives", "ca-certificates", "ca-certificates.conf", "crypto-policies", "fonts"),
    *("group", "host.conf", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime"),
    *("mime.types", "nsswitch.conf", "os-release", "passwd", "pki", "protocols", "resolv.conf"),
    *("services", "ssl", "timezone"),
)
_MASKED = (
    *("acpi", "asound", "kcore", "keys", "latency_stats", "sched_debug", "scsi"),
    *("timer_list", "timer_stats"),
)
"""What of /proc tells of the machine and of others' keys: the list of OCI's runtimes."""
_GSB_URL = f"unix:{_TMP}/yagna.sock"
"""Through which the real gftp talks to yagna, unless the variable names another place."""


def broken(bwrap: str | None = None) -> str | None:
    """Why no sandbox can be made here, in one line, or None. Starts a process; takes some ms."""
    try:
        return never_works(bwrap)
    except NotNow as error:
        return str(error)


def never_works(bwrap: str | None = None) -> str | None:
    """As `broken`, but raises NotNow where another attempt may tell something else."""
    bwrap = bwrap or program()
    if bwrap is None:
        return "bwrap is missing; install it with: apt install bubblewrap"
    command = [bwrap, *_ISOLATION, *_system(), "--", "/bin/sh", "-c", ":"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotNow(f"{_UNTOLD}: no answer in {PROBE_S:g} s; try again") from None
    except OSError as error:
        if error.errno in _PASSING:
            raise NotNow(f"{_UNTOLD}: {error.strerror}; try again") from None
        return f"bwrap does not work here: {type(error).__name__}"
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return f"bwrap does not work here: {said.removeprefix('bwrap: ')}"


def program() -> str | None:
    """Where bwrap is."""
    return shutil.which("bwrap")


def wrapper(bwrap: str, pod: Path, env: Mapping[str, str]) -> list[str]:
    """What goes before a program's argv. ``env``: its `environment`, from which the folders are
    taken that it cannot do without. Touches no file below ``pod``, which is in the mount."""
    arguments = [bwrap, *_ISOLATION, *_system()]
    for path in _readable(env):
        arguments += ["--ro-bind-try", path, path]
    if own := box.named(env):
        arguments += ["--bind", own, own]
    else:
        kind, _, socket = env.get("GSB_URL", _GSB_URL).partition(":")
        if kind == "unix" and os.path.isabs(socket):
            arguments += ["--bind-try", socket, socket]
    # Over the mount point, in case it lies in one of those folders: nothing shows the other pods.
    arguments += ["--tmpfs", str(pod.parent), "--bind", str(pod), str(pod)]
    arguments += ["--remount-ro", str(pod.parent), "--remount-ro", "/"]
    return [*arguments, "--chdir", str(pod), "--"]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` with the places that are other ones inside. Names a new box at each call."""
    inside = {**env, "HOME": _HOME, "TMPDIR": _TMP}
    if registry := env.get(box.VARIABLE):
        own = box.new(registry)
        # The market must find a temporary file that gftp offers under the name it has inside.
        inside |= {box.VARIABLE: own, "TMPDIR": os.path.join(own, box.TMP)}
    return inside


def _system() -> list[str]:
    """The operating system, read-only, and empty private places for what is nobody's business."""
    arguments = [*_proc(), "--dev", "/dev"]
    for path in (_TMP, f"/var{_TMP}", "/run"):
        arguments += ["--tmpfs", path]
    arguments += ["--dir", _HOME]
    for path in _SYSTEM:
        arguments += ["--ro-bind-try", path, path]
    for path in _MERGED:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind-try", path, path]
    for name in _ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return arguments


def _proc() -> list[str]:
    """A /proc with the sandbox's processes that nothing can be written to."""
    arguments = ["--proc", "/proc"]
    for name in _MASKED:
        path = f"/proc/{name}"
        if os.path.isdir(path):
            arguments += ["--tmpfs", path]
        elif os.path.exists(path):
            arguments += ["--dev-bind", "/dev/null", path]
    # All of it, not a list of paths: root owns the machine's settings there even without any
    # capability, each driver can add others, and of its own processes a program needs to read only.
    return [*arguments, "--remount-ro", "/proc"]


def _readable(env: Mapping[str, str]) -> list[str]:
    """This Python with its packages, cpodfs itself, what the driver put on PYTHONPATH, and gftp."""
    package = os.path.dirname(os.path.abspath(cpodfs.__file__))
    found = [sys.prefix, sys.base_prefix, package, *env.get("PYTHONPATH", "").split(os.pathsep)]
    gftp = shutil.which("gftp", path=env.get("PATH", ""))
    if gftp is not None:
        found += [gftp, os.path.realpath(gftp)]
        # The local market's: see `devnet.run_env`.
        beside = (os.path.join(os.path.dirname(gftp), name) for name in ("python3", "python"))
        found += [program for program in beside if os.path.exists(program)]
    return list(dict.fromkeys(p for p in found if os.path.isabs(p) and not _is_inside(p, _SYSTEM)))


def _is_inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
