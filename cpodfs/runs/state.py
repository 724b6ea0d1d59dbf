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
key), sandbox (whether it runs in one), pid (the program's, or null), golem (the
providers and costs so far: of a provider run `provider_status.Status.shown`, of a requestor run that
has called yagna `gateway_books.Books.shown`, but for its warnings; else missing), and
``private``, never shown: supervisor {pid, start_ticks, boot} or null; hires (whether it is a provider
run); published (is the copy in the pod complete? null: nobody has tried since the end) and problem
(why it is not, or null).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence
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

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What is worth waiting for: room."""
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
    process = _look_at(pid)
    return None if process is None else process.start_ticks


def identity(pid: int) -> dict[str, Any]:
    """What `open_pidfd` and `kill_leftovers` need to find a process, or its session, again."""
    return {"pid": pid, "start_ticks": start_ticks(pid), "boot": _boot()}


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


def kill_leftovers(run_id: str, supervisor: Any = None) -> int:
    """Kill every process of a run that nobody minds; returns how many. ``supervisor``: the `identity`
    of the one that died.

    They are known by CPODFS_RUN_ID in the environment that they were started with, by the
    supervisor's session if one of those is in it too (its number alone may have been given to
    others since), or as the offspring of one of these. Not found is who has neither, and whose
    parent was gone before.
    """
    mark = f"CPODFS_RUN_ID={run_id}".encode()
    stopped: dict[int, int] = {}
    # Stopped first, all of them: they cannot fork then, and their offspring stays theirs. Again and
    # again, because one may have been forking while it was looked for.
    for _ in range(_KILL_ROUNDS):
        found = _leftovers(mark, supervisor, stopped)
        stopped |= found
        if not found:
            break
    for fd in stopped.values():
        _send(fd, signal.SIGKILL)
        os.close(fd)
    return len(stopped)


def _leftovers(mark: bytes, supervisor: Any, known: Container[int]) -> dict[int, int]:
    """Stop the processes that are not ``known`` yet; their pids with a pidfd each."""
    alive = {pid: process for pid in _pids() if (process := _look_at(pid)) is not None}
    # Neither we nor what is ours, whoever may have started us.
    alive.pop(os.getpid(), None)
    session = _session(supervisor, alive)
    theirs = {pid for pid in alive if _is_marked(pid, mark)}
    if any(alive[pid].started_in(session) for pid in theirs):
        theirs |= {pid for pid, process in alive.items() if process.started_in(session)}
    level = theirs
    while level:
        level = {pid for pid, p in alive.items() if p.parent in level} - theirs
        theirs |= level
    found = {}
    for pid in theirs:
        if pid in known:
            continue
        fd = open_pidfd({"pid": pid, "start_ticks": alive[pid].start_ticks})
        if fd is None:
            continue
        if _send(fd, signal.SIGSTOP):
            found[pid] = fd
        else:
            os.close(fd)
    return found


def _session(supervisor: Any, alive: Mapping[int, _Process]) -> tuple[int, int] | None:
    """The number of a dead supervisor's session, and when it began; None if it cannot be told."""
    boot = _boot()
    if boot is None or not isinstance(supervisor, dict) or supervisor.get("boot") != boot:
        return None
    pid, ticks = supervisor.get("pid"), supervisor.get("start_ticks")
    if not isinstance(pid, int) or not isinstance(ticks, int):
        return None
    # The number stays taken as long as somebody is in the session: with another process in its
    # place there was nobody left.
    if pid in alive and alive[pid].start_ticks != ticks:
        return None
    return pid, ticks


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except OSError:
        return False


def _send(fd: int, number: int) -> bool:
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    return True


def children(parent: int) -> list[int]:
    """The pids of a process's children, zombies included."""
    processes = ((pid, _look_at(pid)) for pid in _pids())
    return [pid for pid, p in processes if p is not None and p.parent == parent]


def descendants(ancestor: int) -> list[int]:
    """The pids of a process's children, their children, and so on."""
    found: list[int] = []
    level = [ancestor]
    while level:
        level = [pid for parent in level for pid in children(parent)]
        found += level
    return found


def descends(task: int, ancestor: int) -> bool:
    """Whether a thread (or process) belongs to the process ``ancestor`` or to one below it."""
    if os.path.exists(f"/proc/{ancestor}/task/{task}"):
        return True
    while (process := _look_at(task)) is not None and process.parent:
        task = process.parent
        if task == ancestor:
            return True
    return False


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or by whoever traces it."""
    process = _look_at(pid)
    return process is not None and process.state in b"Tt"


class _Process:
    """A line of /proc/PID/stat: the state's letter, the parent's pid, the session's number, clock
    ticks since boot."""

    def __init__(self, fields: Sequence[bytes]) -> None:
        self.state = fields[0]
        self.parent, self.session, self.start_ticks = (int(fields[n]) for n in (1, 3, 19))

    def started_in(self, session: tuple[int, int] | None) -> bool:
        return session is not None and self.session == session[0] and self.start_ticks >= session[1]


def _look_at(pid: int) -> _Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return _Process(file.read().rpartition(b")")[2].split())
    except (OSError, IndexError):
        return None


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _boot() -> str | None:
    """Differs from one start of the machine to the next; None where it is hidden."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return None
