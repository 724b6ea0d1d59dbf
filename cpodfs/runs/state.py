"""What is on disk about a run, and who may write it. Shared by the driver and the supervisor.

Imports little of the standard library and nothing else: the supervisor must start fast.
The one rule: only the holder of the flock on ``lock`` writes ``run.json``. The driver takes the
lock when it makes the folder and hands the open file to the supervisor, so that there is no moment
at which a run that can still start looks dead; a lock that is free means that nobody minds the run.

    runs_dir/<pod key>/<run id>/
        lock            empty, flocked as long as somebody minds the run
        run.json        the record (below), replaced atomically
        stdout.log      the spool: all that the program wrote, the copies in the mount follow it
        stderr.log
        supervisor.log  last words of the supervisor; empty unless it has a bug

Record: version, id, pod, state, host, created, started, ended (UTC, ISO 8601, or null), exit_code
(int or null), signal (name or null), error (one line or null), exec (list), log (folder of this
run in the pod), recipe_file, recipe (as run), warnings, set (what was changed for this run, by
key), sandbox (whether it runs in one), pid (the program's, or null), golem (of a provider run:
the providers, costs and tasks so far, `provider_status.Status.shown`; else missing), and
``private``, never shown: supervisor {pid, start_ticks} or null; hires (whether it is a provider
run); published (is the copy in the pod complete? null: nobody has tried since the end) and problem
(why it is not, or null).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import Any

    Record = dict[str, Any]

RECORD_VERSION = 1
RECORD_LIMIT_BYTES = 16 * 1024 * 1024
STARTING, RUNNING = "starting", "running"
FINISHED, FAILED, CANCELLED, LOST = "finished", "failed", "cancelled", "lost"
ENDED = frozenset({FINISHED, FAILED, CANCELLED, LOST})
STREAMS = ("stdout.log", "stderr.log")
RECORD_FILE = "run.json"

TEXT_LIMIT = 500

_KEY_LIMIT = 200
_KILL_ROUNDS = 20
_TEXTS = ("id", "pod", "state", "log")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def pod_key(pod: str) -> str:
    """A folder name for a pod: never empty, ``.`` or ``..``, no slash, different for every pod."""
    data = os.fsencode(pod)
    key = "".join(chr(b) if b in _PLAIN else f"%{b:02X}" for b in data) or "%"
    if len(key) <= _KEY_LIMIT:
        return key
    # Here, for the supervisor never needs it and it is slow to import.
    import hashlib

    return f"{key[:100]}~{hashlib.sha256(data).hexdigest()}"


def utc_now() -> str:
    """Now, as in ``2026-11-24T05:30:12.123Z``."""
    now = time.time_ns()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
    return f"{stamp}.{now // 10**6 % 1000:03d}Z"


def new_run_id() -> str:
    """An id that sorts by time, as in ``20261124T053012.123Z-ab12``."""
    return f"{utc_now().replace('-', '').replace(':', '')}-{os.urandom(2).hex()}"


def new_record(run_id: str, pod: str, argv: Sequence[str], log: str) -> Record:
    """A record in state ``starting``; ``log`` is the run's log folder, relative to the pod."""
    return {
        "version": RECORD_VERSION,
        "id": run_id,
        "pod": pod,
        "state": STARTING,
        "host": os.uname().nodename,
        "created": utc_now(),
        "started": None,
        "ended": None,
        "exit_code": None,
        "signal": None,
        "error": None,
        "exec": list(argv),
        "log": log,
        "recipe_file": None,
        "recipe": None,
        "warnings": [],
        "set": {},
        "sandbox": False,
        "pid": None,
        "private": {"supervisor": None, "hires": False, "published": None, "problem": None},
    }


def bounded(value: Any) -> Any:
    """A JSON value, each text in it one line of `TEXT_LIMIT` at most: strangers wrote them."""
    if isinstance(value, str):
        line = " ".join(value[: 2 * TEXT_LIMIT].split()) if "\n" in value else value
        return line if len(line) <= TEXT_LIMIT else f"{line[: TEXT_LIMIT - 1]}…"
    if isinstance(value, dict):
        return {key: bounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [bounded(inner) for inner in value]
    return value


def end_record(record: Record, state: str, error: str | None = None) -> None:
    """Note the end of a run, now."""
    record.update(state=state, ended=utc_now(), error=error)


def public(record: Record) -> Record:
    """The part of a record that users see."""
    return {key: value for key, value in record.items() if key != "private"}


def read_record(folder: str | Path) -> Record | None:
    """The record of a run, or None when there is none that can be read."""
    try:
        with open(os.path.join(folder, RECORD_FILE), "rb") as file:
            record = json.loads(file.read(RECORD_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("version") != RECORD_VERSION:
        return None
    whole = isinstance(record.get("private"), dict) and isinstance(record.get("exec"), list)
    if not whole or not all(isinstance(record.get(key), str) for key in _TEXTS):
        return None
    return record


def write_record(folder: str | Path, record: Record, *, durable: bool) -> None:
    """Replace the record. The caller holds the run's lock. ``durable``: survives a power cut too."""
    path = os.path.join(folder, RECORD_FILE)
    fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(json.dumps(record).encode())
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
    if durable:
        sync_folder(folder)


def encode(record: Record) -> bytes:
    """A record as JSON for people and programs: ASCII, indented, ends in a newline."""
    return json.dumps(record, indent=2).encode() + b"\n"


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def take_lock(folder: str | Path) -> int | None:
    """The open, locked ``lock`` of a run; None when somebody minds it. Close it to let go."""
    path = os.path.join(folder, "lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process.

    With the pid it names one process: a pid alone may have been given to another since.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def identity(pid: int) -> dict[str, int | None]:
    """What `open_pidfd` needs to find a process again."""
    return {"pid": pid, "start_ticks": start_ticks(pid)}


def open_pidfd(who: Any) -> int | None:
    """A pidfd of the process that `identity` described, if it still lives."""
    if not isinstance(who, dict) or not isinstance(who.get("pid"), int) or who["pid"] <= 0:
        return None
    try:
        fd = os.pidfd_open(who["pid"])
    except OSError:
        return None
    # Checked after opening: from here on the pid cannot change its meaning.
    if start_ticks(who["pid"]) != who.get("start_ticks"):
        os.close(fd)
        return None
    return fd


def kill_leftovers(run_id: str) -> int:
    """Kill every process of a run that nobody minds; returns how many.

    They are known by CPODFS_RUN_ID in the environment that they were started with.
    """
    mark = f"CPODFS_RUN_ID={run_id}".encode()
    killed: set[int] = set()
    # Again and again, because one may have been forking while it was looked for.
    for _ in range(_KILL_ROUNDS):
        found = {pid for pid in _pids() if pid != os.getpid() and _kill_if_marked(pid, mark)}
        if found <= killed:
            break
        killed |= found
    return len(killed)


def _kill_if_marked(pid: int, mark: bytes) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            marked = mark in file.read().split(b"\0")
        if marked:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(fd)
    return marked


def children(parent: int) -> list[int]:
    """The pids of a process's children, zombies included."""
    found = []
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == parent:
                    found.append(pid)
        except (OSError, IndexError):
            continue
    return found


def descendants(ancestor: int) -> list[int]:
    """The pids of a process's children, their children, and so on."""
    found: list[int] = []
    level = [ancestor]
    while level:
        level = [pid for parent in level for pid in children(parent)]
        found += level
    return found


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
