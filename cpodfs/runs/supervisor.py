"""The process that minds one run: starts the program, keeps its output, ends what it leaves behind.

``python -m cpodfs.runs.supervisor RUN_FOLDER LOCK_FD`` with a job on stdin (`read_job`), or
``… --publish RUN_FOLDER LOCK_FD MOUNTPOINT TIMEOUT_S`` to complete the pod's copy of a run that
is over. Outlives the driver. Imports its neighbours that import as little, and the standard library: its start is
part of the time from ``touch .run`` to the program. Holds the run's lock, so it alone writes
``run.json``. Blocking is fine here, except in the main thread on the mount once a program runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

from cpodfs.limits import give_back_open_files
from cpodfs.runs import box, gateway_link, keep, keyring, mirror, provider_link, state
from cpodfs.runs.program import Program
from cpodfs.runs.stream import LOG_LIMIT_BYTES, Spool, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpodfs.runs.state import Record

_PRUNE_LIMIT_S = 10.0
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36


def read_job(data: bytes) -> dict[str, Any] | None:
    """The job that the driver sends, or None when it died while sending.

    env: the program's whole environment but for CPODFS_*; yagna's app-key is in it, so it is never
    written anywhere, and a program on this machine gets another one, its gateway's. mountpoint: path. folders: script, payload, output, log, relative to the pod.
    grace_s: from SIGINT to SIGKILL. publish_s: how long to go on trying to complete the copy in
    the pod after the end. keep: run folders that stay in the pod. wrap: what goes before the
    program's argv, if it runs in a sandbox. open_files: the program's soft limit. provider: the recipe's ``Runtime`` as an object, or
    null; if it is there the program runs on a provider, and `provider_link` speaks to who sees to it.
    limits: of a requestor session, limit (GLM) and stop_after, or nulls; see `gateway.Job`.
    """
    try:
        job = json.loads(data)
    except ValueError:
        return None
    return job if isinstance(job, dict) else None


class Supervisor:
    """One run, from the record in state ``starting`` to its end."""

    def __init__(self, folder: str, record: Record, job: dict[str, Any], wake: int) -> None:
        self._folder = folder
        self._record = record
        self._job = job
        self._wake = wake
        self._pod = os.path.join(job["mountpoint"], record["pod"])
        self._program: Program
        self._box: box.Box | None = None
        self._spools: list[Spool] = []
        self._streams: list[Stream | provider_link.Link] = []
        self._link: provider_link.Link | None = None
        self._gateway: gateway_link.Gateway | None = None
        self._yagna_env: dict[str, str] = {}
        self._warnings = record["warnings"]
        self._stop: str | None = None
        self._follower = mirror.Follower(
            mirror.Mirror(folder, job["mountpoint"], record["pod"], record["log"])
        )

    def run(self) -> None:
        """See the run through. Returns when the copy in the pod is complete or given up."""
        try:
            self._see_through()
        finally:
            if self._box is not None:
                self._box.close()

    def _see_through(self) -> None:
        self._spools = [Spool(self._spool(name)) for name in state.STREAMS]
        try:
            self._start()
        except (OSError, ValueError) as exc:
            if self._gateway is not None:
                self._gateway.finish()
            error = _why_not(exc, self._record["exec"][0], self._pod)
            self._spools[1].write(f"cpodfs: {error}\n".encode(errors="backslashreplace"))
            state.end_record(self._record, state.FAILED, error)
            self._follower.start()
        else:
            self._record.update(state=state.RUNNING, pid=self._program.pid)
            self._save(durable=False)
            self._follower.start()
            self._mind()
            self._end()
        self._save(durable=True)
        _finish_copy(self._follower, self._record, self._job["publish_s"])
        self._save(durable=False)
        keep.prune(self._pod, self._record["log"], self._job["keep"], _PRUNE_LIMIT_S)

    def _spool(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(os.path.join(self._folder, name), flags, 0o600)

    def _start(self) -> None:
        folders = self._job["folders"]
        if not os.path.isdir(os.path.join(self._pod, folders["output"])):
            os.close(mirror.make_folder(self._pod, folders["output"].split("/")))
        try:
            os.close(mirror.make_folder(self._pod, self._record["log"].split("/")))
        except OSError:
            # The mirror will try again; the program can do without.
            pass
        env = dict(self._job["env"])
        env |= {
            f"CPODFS_{name.upper()}": os.path.join(self._pod, folder)
            for name, folder in folders.items()
        }
        env["CPODFS_RUN_ID"] = self._record["id"]
        env["CPODFS_POD"] = self._record["pod"]
        env["CPODFS_RUN_LOG"] = os.path.join(self._pod, self._record["log"])
        self._record["started"] = state.utc_now()
        self._yagna_env = env | {"PYTHONPATH": _with_ours(env.get("PYTHONPATH"))}
        if not self._job.get("provider") and env.get(gateway_link.KEY):
            self._gateway = gateway_link.Gateway(env, self._job["limits"])
            env = self._gateway.env
        give_back_open_files(self._job["open_files"])
        if self._job.get("provider"):
            self._start_link()
            return
        if self._job["wrap"] and (own := box.named(env)):
            self._box = box.Box(own, [self._pod])
        process = subprocess.Popen(
            [*self._job["wrap"], *self._record["exec"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._pod,
            env=env,
            process_group=0,
            # Not for us: a home folder may be readable only with a key of the user's session.
            preexec_fn=keyring.leave_session if self._job["wrap"] else None,  # noqa: PLW1509
        )
        # The thread that copies started later, so that nothing but this thread was forked.
        self._program = Program(process, sandboxed=bool(self._job["wrap"]))
        pipes = (process.stdout, process.stderr)
        self._streams = [
            Stream(pipe.fileno(), spool)
            for pipe, spool in zip(pipes, self._spools, strict=True)
            if pipe is not None
        ]

    def _start_link(self) -> None:
        """Start the process that hires providers, hand it its job, and listen to it."""
        process = subprocess.Popen(
            provider_link.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._pod,
            env=self._yagna_env,
            process_group=0,
        )
        self._program = Program(process)
        pipes = process.stdin, process.stdout, process.stderr
        assert pipes[0] is not None
        assert pipes[1] is not None
        assert pipes[2] is not None
        self._link = provider_link.Link(pipes[1].fileno(), self._named_spools(), self._take_status)
        self._streams = [self._link, Stream(pipes[2].fileno(), self._spools[1])]
        job = {
            "runtime": self._job["provider"],
            "argv": self._record["exec"],
            "pod": self._pod,
            "log": self._record["log"],
            "scratch": os.path.join(self._folder, "transfer"),
            **{name: self._job["folders"][name] for name in ("script", "payload", "output")},
        }
        try:
            with pipes[0]:
                pipes[0].write(json.dumps(job).encode())
        except BrokenPipeError:
            # It died; what it said last is in the log.
            pass

    def _named_spools(self) -> dict[str, Spool]:
        return dict(zip(("stdout", "stderr"), self._spools, strict=True))

    def _take_status(self, status: dict[str, Any]) -> None:
        self._record["golem"] = state.bounded(status)
        self._save(durable=False)

    def _take_session(self, status: dict[str, Any]) -> None:
        """A status of the gateway's: what it warns of stands with the recipe's warnings."""
        warnings, self._stop = status.pop("warnings"), status.pop("stop", None)
        self._record["warnings"] = [*self._warnings, *state.bounded(warnings)]
        self._take_status(status)
        if self._stop is not None:
            self._program.cancel(self._job["grace_s"])

    def _open_gateway(self, gateway: gateway_link.Gateway) -> list[Stream | provider_link.Link]:
        """The program wants to speak to yagna: start who passes that on."""
        try:
            streams = gateway.start(self._record["id"], self._named_spools(), self._take_session)
        except OSError as exc:
            self._spools[1].offer(f"cpodfs: no gateway to yagna: {exc.strerror}\n".encode())
            return []
        if gateway.pid is not None:
            self._program.others.add(gateway.pid)
        self._streams += streams
        return streams

    def _mind(self) -> None:
        """Serve the pipes and the signals until the program has ended (and its group, if asked)."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        by_pipe = {stream.pipe: stream for stream in self._streams}
        for pipe in by_pipe:
            poll.register(pipe, select.POLLIN)
        caller = None if self._gateway is None else self._gateway.pipe
        if caller is not None:
            poll.register(caller, select.POLLIN)
        full: list[Stream | provider_link.Link] = []
        while not self._program.over():
            for fd, _ in poll.poll(self._timeout_ms(bool(full))):
                if fd == self._wake:
                    self._signals()
                    continue
                if fd == caller and self._gateway is not None:
                    poll.unregister(fd)
                    caller = None
                    for stream in self._open_gateway(self._gateway):
                        by_pipe[stream.pipe] = stream
                        poll.register(stream.pipe, select.POLLIN)
                    continue
                stream = by_pipe[fd]
                moved = stream.pump()
                if moved:
                    self._follower.notify()
                elif moved is None:
                    poll.unregister(fd)
                elif stream.full:
                    poll.unregister(fd)
                    full.append(stream)
            full = self._retry(full, poll)
            self._program.tick()

    def _retry(
        self, full: list[Stream | provider_link.Link], poll: select.poll
    ) -> list[Stream | provider_link.Link]:
        left = []
        for stream in full:
            if stream.pump():
                poll.register(stream.pipe, select.POLLIN)
                self._follower.notify()
            else:
                left.append(stream)
        return left

    def _timeout_ms(self, spool_full: bool) -> int | None:
        waits = [mirror.RETRY_S] if spool_full else []
        if (tick_s := self._program.next_tick_s()) is not None:
            waits.append(tick_s)
        return int(min(waits) * 1000) + 1 if waits else None

    def _signals(self) -> None:
        if signal.SIGTERM in os.read(self._wake, 4096):
            if self._link is None:
                self._program.cancel(self._job["grace_s"])
            else:
                # Not its gftp, which it needs to come to an end.
                self._program.cancel_alone(provider_link.GRACE_S)
        self._program.reap()

    def _end(self) -> None:
        """Kill what is left, take in the last output, write down how it ended."""
        self._program.kill_children(self._wake)
        if self._gateway is not None:
            self._end_session(self._gateway)
        for stream in self._streams:
            while stream.pump():
                pass
        for spool in self._spools:
            spool.flush()
        self._follower.notify()
        cancelled, status = self._program.cancelled, self._program.status
        outcome = state.FINISHED if status == 0 else state.FAILED
        error = self._complaint()
        state.end_record(self._record, state.CANCELLED if cancelled else outcome, error)
        if self._stop is not None:
            state.end_record(self._record, state.FAILED, f"stopped: {self._stop}")
        if self._link is not None:
            self._end_link(self._link, cancelled)
        elif status is None:
            # Beyond us: nobody will tell how it ends.
            return
        elif status < 0:
            self._record["signal"] = _signal_name(-status)
        else:
            self._record["exit_code"] = status

    def _complaint(self) -> str | None:
        """What did not go as it should, other than the program itself, in one line."""
        program = self._program
        if program.meddled:
            return "it stopped its sandbox's own process, and was killed for that"
        if program.beyond_us and (program.status is None or program.children()):
            return "it could not be ended: processes of it belong to another user, and go on"
        if lost := sum(spool.lost + len(spool.pending) for spool in self._spools):
            return f"{lost} bytes or more of output were lost: no space for the log"
        if over := sum(spool.thrown_away for spool in self._spools):
            return f"{over} bytes of output were thrown away: a log is {LOG_LIMIT_BYTES} at most"
        return None

    def _end_session(self, gateway: gateway_link.Gateway) -> None:
        """What the program has left at the market is ended and paid."""
        heard = gateway.finish()
        golem = self._record.get("golem")
        if golem is None:
            return
        if not heard:
            self._spools[1].offer(b"cpodfs: the gateway to yagna died\n")
        if golem["phase"] == "over":
            return
        left = ", ".join(f"{kind}: {count}" for kind, count in golem.get("left", {}).items())
        provider_link.clean_up(golem, self._yagna_env, self._spools[1].fd)
        done = "all is ended and paid now" if golem["phase"] == "over" else "not all could be ended"
        note = f"cpodfs: the program left open at the market: {left or 'what it had'}; {done}\n"
        self._spools[1].offer(note.encode())

    def _end_link(self, link: provider_link.Link, cancelled: bool) -> None:
        """What the process said last, or that it said nothing."""
        last = state.bounded(link.end or {})
        error, code = last.get("error"), last.get("exit_code")
        if link.end is None and cancelled and not self._record.get("golem"):
            # It had begun nothing yet.
            error = "cancelled"
        elif link.end is None:
            # Its own exit code says nothing: a last word that was lost may have told of a failure.
            status = self._program.status or 0
            how = _signal_name(-status) if status < 0 else f"exit code {status}"
            error = f"the provider run's own process died ({how}); see stderr.log"
            code = status if status > 0 else None
        golem = self._record.get("golem")
        if golem and (link.end is None or provider_link.is_any_open(golem)):
            provider_link.clean_up(golem, self._yagna_env, self._spools[1].fd)
            self._follower.notify()
        if (code or link.end is None) and not cancelled:
            self._record["state"] = state.FAILED
        self._record["exit_code"] = code
        if error is not None and self._record["error"] is None and error != "cancelled":
            self._record["error"] = error

    def _save(self, *, durable: bool) -> None:
        """Write the record. The end of a run is one only when it is written: a disk that is full is
        waited for, other errors as long as the copy may be."""
        deadline = time.monotonic() + self._job["publish_s"]
        while True:
            try:
                state.write_record(self._folder, self._record, durable=durable)
            except OSError as exc:
                # Before the end, the program matters more than its record.
                if not durable:
                    return
                if exc.errno not in state.FULL and time.monotonic() >= deadline:
                    raise
                time.sleep(mirror.RETRY_S)
            else:
                return


def _with_ours(path: str | None) -> str:
    """A PYTHONPATH on which this package is found, too."""
    return os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH", "")) if p)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def _why_not(exc: OSError | ValueError, program: str, pod: str) -> str:
    """Why the program did not start, in one line."""
    if not isinstance(exc, OSError):
        return f"golem.exec: {program!a}: cannot be started ({type(exc).__name__})"
    reason = exc.strerror or str(exc)
    if not os.path.isdir(pod):
        return f"cannot use {pod!a}: {reason}"
    if isinstance(exc, FileNotFoundError):
        return f"golem.exec: {program!a}: no such program, or no interpreter for it"
    if exc.filename == program:
        return f"golem.exec: {program!a}: {reason}"
    return f"cannot start in {pod!a}: {exc.filename!a}: {reason}"


def _listen() -> int:
    """From here on SIGTERM and SIGCHLD are bytes to read from the fd returned."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # What a background shell or nohup ignores, the program need not; Python itself ignores two.
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # Handlers, not SIG_IGN, which the program would inherit.
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _supervise(folder: str) -> None:
    record = state.read_record(folder)
    if record is None or record["state"] != state.STARTING:
        return
    wake = _listen()
    record["private"]["supervisor"] = state.identity(os.getpid())
    state.write_record(folder, record, durable=False)
    try:
        os.write(1, b"ready\n")
    except BrokenPipeError:
        # The driver died, then so did the job: the next line finds out.
        pass
    job = read_job(sys.stdin.buffer.read())
    if job is None:
        state.end_record(record, state.LOST, "the driver died before the program was started")
        state.write_record(folder, record, durable=True)
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The program is of the same user, and the key in our memory is not for it.
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    Supervisor(folder, record, job, wake).run()


def publish(folder: str, mountpoint: str, timeout_s: float) -> bool:
    """Complete the pod's copy of a run that is over; the caller holds its lock."""
    record = state.read_record(folder)
    if record is None or record["state"] not in state.ENDED:
        return False
    for name in state.STREAMS:
        os.close(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CREAT, 0o600))
    follower = mirror.Follower(mirror.Mirror(folder, mountpoint, record["pod"], record["log"]))
    follower.start()
    _finish_copy(follower, record, timeout_s)
    state.write_record(folder, record, durable=False)
    return follower.complete


def _finish_copy(follower: mirror.Follower, record: Record, timeout_s: float) -> None:
    """Wait for the copy in the pod, ``timeout_s`` at most, and note what came of it."""
    complete = follower.finish(timeout_s)
    problem = None if complete else follower.problem or "the mount does not answer"
    record["private"].update(published=complete, problem=problem)


def main(argv: list[str]) -> int:
    """Entry point; see the module's docstring. The status says nothing about the program."""
    done = True
    if argv[0] == "--publish":
        os.set_inheritable(int(argv[2]), False)
        done = publish(argv[1], argv[3], float(argv[4]))
    else:
        os.set_inheritable(int(argv[1]), False)
        _supervise(argv[0])
    # Not sys.exit: a thread that hangs in the mount must not keep us.
    os._exit(0 if done else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
