"""The driver's side of runs: begins them, watches their supervisors, finds them again after a crash.

Imports recipe, errors and `state`; trio. Never touches the mount: this process serves it, so what
must go through the mount is done by `supervisor` in a process of its own.
Invariant: a pod is in ``_active`` from `begin` (or recovery) until just before ``on_end``, and
only the holder of a run's lock writes its record. All of it belongs to one trio thread; between
``begin``'s check and its entry in ``_active`` there is no await.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import trio

from cpodfs.errors import CpodfsError, RunError, RunInProgress
from cpodfs.recipe import Recipe
from cpodfs.runs import debts, state
from cpodfs.runs.active import Run
from cpodfs.runs.keep import newest_first
from cpodfs.runs.launch import end_agreements, hand_over, open_supervisor, pidfd_of_child
from cpodfs.runs.provider_link import GRACE_S
from cpodfs.runs.spawn import AS_EVER, How, program_start

log = logging.getLogger(__name__)

_UNIDENTIFIED_POLL_S = 0.1
_LOCK_WAIT_S = 5.0
_ROOM_RETRY_S = 1.0
_LOGS_S = 6.0
_KILL_WAIT_S = 5.0
_QUICK_PUBLISH_S = 5.0
_NEW = ".new-"


class RunManager:
    """At most one run per pod, each minded by a supervisor that outlives this process.

    ``runs_dir``: records and spools; made if missing. ``environment()`` is asked at every start
    for what programs get beyond the usual (YAGNA_APPKEY, …); its PATH, if any, goes before
    everything else on the program's. It may block for a moment and may raise. ``on_end(pod)`` is
    called in the trio thread when a run is over and its logs are complete; it must not block.
    ``on_over(pod)`` is awaited just before that, while nobody can start another: nothing of the run is
    left that could change anything.
    ``cancel_grace_s``: from SIGINT to SIGKILL. ``keep``: runs remembered per pod.
    ``publish_s``: how long a supervisor goes on trying to reach the mount after the program's end.

    Use: ``await nursery.start(manager.run)`` recovers and returns; the rest works from then on.
    Cancelling `run` forgets the supervisors but leaves them alone; to end them, `cancel_all`.
    """

    def __init__(
        self,
        runs_dir: Path,
        mountpoint: Path,
        *,
        environment: Callable[[], Mapping[str, str]],
        on_end: Callable[[str], None],
        on_over: Callable[[str], Awaitable[None]] | None = None,
        cancel_grace_s: float = 10.0,
        keep: int = 20,
        publish_s: float = 60.0,
    ) -> None:
        # Absolute, but links are kept: the path in the mount is what programs see.
        self._runs_dir = Path(os.path.abspath(runs_dir))
        self._mountpoint = Path(os.path.abspath(mountpoint))
        self._environment = environment
        self._on_end = on_end
        self._on_over = on_over
        self._grace_s = cancel_grace_s
        self._keep = keep
        self._publish_s = publish_s
        self._active: dict[str, Run] = {}
        self._nursery: trio.Nursery | None = None
        self._closing = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. ``task_status`` is told when earlier runs have been recovered."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self.recover()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def recover(self) -> None:
        """Adopt the runs that go on, record the others as lost. Called by `run`, once.

        Does not wait for the mount; copies that are missing there are completed in the background.
        """
        nursery = self._started()
        alive, unpublished, owing = await trio.to_thread.run_sync(self._scan)
        for run in alive:
            self._active[run.pod] = run
            log.info("run adopted pod=%r run=%s", run.pod, run.id)
            # With the lock in our hands it is over, but has agreements to be ended.
            nursery.start_soon(self._adopt if run.lock is None else self._settle, run)
        nursery.start_soon(self._publish_all, unpublished)
        for folder in owing:
            nursery.start_soon(self._settle_debts, folder)

    def begin(self, pod: str, recipe: Recipe, how: How = AS_EVER) -> str:
        """Start a run; returns its id once it is on disk (some fsyncs, some ms), not once it runs.

        What goes wrong from then on is a failed run. Raises RunInProgress, or RunError if the run
        cannot be recorded (its ``errno`` is the disk's).
        """
        nursery = self._started()
        if self._closing:
            raise RunError(f"{pod}: the mount is being taken down")
        if pod in self._active:
            raise RunInProgress(f"{pod}: run {self._active[pod].id} is in progress")
        if recipe.runtime is not None:
            # What runs here is ours; the program is in the provider's sandbox.
            how = replace(how, sandbox=None)
        try:
            run = self._journal(pod, recipe, how)
        except OSError as exc:
            error = RunError(f"{pod}: the run cannot be recorded: {exc}")
            error.errno = exc.errno or error.errno
            raise error from exc
        self._active[pod] = run
        log.info("run begins pod=%r run=%s", pod, run.id)
        nursery.start_soon(self._drive, run, recipe, how)
        return run.id

    def in_progress(self, pod: str) -> bool:
        """Whether the pod has a run; unlike `current` it reads nothing."""
        return pod in self._active

    def is_of_run(self, pod: str, task: int) -> bool:
        """Whether a thread or process belongs to the pod's run, if this driver has begun that. To be asked
        while the process waits for an answer, so that its number is its own."""
        run = self._active.get(pod)
        return (
            run is not None and run.supervisor is not None and state.descends(task, run.supervisor)
        )

    def pods(self) -> list[str]:
        """The pods that have a run."""
        return list(self._active)

    def current(self, pod: str) -> dict[str, Any] | None:
        """The record of the pod's run in progress, without the recipe; None when there is none.

        A small synchronous read. The state may already be a final one while logs are completed.
        """
        run = self._active.get(pod)
        if run is None:
            return None
        record = state.public(state.read_record(run.folder) or run.record)
        record.pop("recipe", None)
        return record

    def cancel(self, pod: str) -> bool:
        """Ask the pod's run to end; False when there is none. Returns at once, ``on_end`` follows."""
        run = self._active.get(pod)
        if run is None:
            return False
        run.cancelled = True
        run.signal(signal.SIGTERM)
        return True

    async def wait_end(self, pod: str, limit_s: float) -> None:
        """Wait until the pod has no run in progress, ``limit_s`` at most."""
        if (run := self._active.get(pod)) is not None:
            with trio.move_on_after(limit_s):
                await run.ended.wait()

    async def cancel_all(self) -> None:
        """End every run and begin no other (until `reopen`); kill what is left after the grace.

        Call it while the mount is served: the last logs go through it, for which there is `_LOGS_S`
        more. Killing takes at most `_KILL_WAIT_S` more. Provider runs have a grace of their own.
        """
        self._closing = True
        runs = list(self._active.values())
        for run in runs:
            self.cancel(run.pod)
        deadline_s, kill_wait_s = self._grace_s + _LOGS_S, _KILL_WAIT_S
        if any(run.hires for run in runs):
            # Agreements that nobody ends cost money: grace for the process, then to clean up.
            deadline_s = max(deadline_s, 2 * GRACE_S + _KILL_WAIT_S)
            kill_wait_s += GRACE_S
        with trio.move_on_after(deadline_s):
            for run in runs:
                await run.ended.wait()
            return
        for run in runs:
            run.signal(signal.SIGKILL)
        with trio.move_on_after(kill_wait_s):
            for run in runs:
                await run.ended.wait()

    def reopen(self) -> None:
        """The mount stays after all: runs may begin again."""
        self._closing = False

    def record(self, pod: str, run_id: str) -> dict[str, Any] | None:
        """The record of one of the pod's runs, in progress or over, if it is remembered."""
        if "/" in run_id or run_id.startswith("."):
            return None
        record = state.read_record(self._runs_dir / state.pod_key(pod) / run_id)
        return None if record is None else state.public(record)

    def history(self, pod: str) -> list[dict[str, Any]]:
        """The records of the pod's runs that are remembered, the newest first."""
        folders = _run_folders(self._runs_dir / state.pod_key(pod))
        records = (state.read_record(folder) for folder in folders)
        return [state.public(record) for record in records if record is not None]

    def _started(self) -> trio.Nursery:
        if self._nursery is None:
            raise RunError("runs are not being served (yet, or any more)")
        return self._nursery

    def _journal(self, pod: str, recipe: Recipe, how: How) -> Run:
        """Put a new run on disk, locked. Under another name until it is complete."""
        parent = self._runs_dir / state.pod_key(pod)
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_id = state.new_run_id()
        while (parent / run_id).exists():
            run_id = state.new_run_id()
        record = state.new_record(run_id, pod, recipe.exec_argv, f"{recipe.log}/{run_id}")
        record.update(recipe_file=recipe.file, recipe=recipe.raw, warnings=list(recipe.warnings))
        record["private"]["hires"] = recipe.runtime is not None
        record.update(set=dict(how.changes), sandbox=how.sandbox is not None)
        draft = parent / f"{_NEW}{run_id}"
        draft.mkdir(mode=0o700)
        lock = state.take_lock(draft)
        try:
            state.write_record(draft, record, durable=True)
            draft.rename(parent / run_id)
            state.sync_folder(parent)
            state.sync_folder(self._runs_dir)
        except OSError:
            if lock is not None:
                os.close(lock)
            raise
        return Run(pod, run_id, parent / run_id, record, lock)

    async def _drive(self, run: Run, recipe: Recipe, how: How) -> None:
        """A run of our own, from its journal entry to its end."""
        try:
            await self._supervise(run, recipe, how)
        except (OSError, CpodfsError, trio.BrokenResourceError) as exc:
            self._fail(run, f"cannot start the supervisor: {exc}")
        except Exception as exc:
            log.exception("run could not be started pod=%r run=%s", run.pod, run.id)
            # The name only: what the text says is not ours and may be secret.
            self._fail(run, f"cannot start the supervisor: {type(exc).__name__}")
        except trio.Cancelled:
            # The driver goes. Not started: the free lock says that it is lost.
            run.let_go()
            raise
        await self._settle(run)

    async def _supervise(self, run: Run, recipe: Recipe, how: How) -> None:
        if run.cancelled:
            run.write_end(state.CANCELLED, "cancelled before the program was started")
            return
        folders = {name: getattr(recipe, name) for name in ("script", "payload", "output", "log")}
        job = {
            **program_start(how, self._mountpoint / run.pod, self._environment(), os.environ),
            "limits": {"limit": recipe.budget, "stop_after": recipe.stop_after},
            "provider": None if recipe.runtime is None else asdict(recipe.runtime),
            "keep": self._keep,
            "mountpoint": str(self._mountpoint),
            "folders": folders,
            "grace_s": self._grace_s,
            "publish_s": self._publish_s,
        }
        assert run.lock is not None
        process = await open_supervisor(run.folder, run.lock, [])
        run.supervisor = process.pid
        os.close(run.lock)
        run.lock = None
        # A job half sent is a run lost, so a cancelled driver still hands over what it has begun.
        with trio.move_on_after(_LOCK_WAIT_S, shield=True):
            await hand_over(process, job)
        run.pidfd = pidfd_of_child(process)
        run.pass_on_cancel()
        await process.wait()
        run.supervisor = None

    async def _adopt(self, run: Run) -> None:
        """A run of an earlier driver: its supervisor is not our child."""
        while (lock := await run.try_lock()) is None:
            record = state.read_record(run.folder) or run.record
            run.pidfd = state.open_pidfd(record["private"].get("supervisor"))
            if run.pidfd is None:
                if not run.folder.exists():
                    break
                # It has just been started and has not said who it is, or has just ended.
                await trio.sleep(_UNIDENTIFIED_POLL_S)
                continue
            run.pass_on_cancel()
            await trio.lowlevel.wait_readable(run.pidfd)
            run.close_pidfd()
        run.lock = lock
        await self._settle(run)

    async def _settle(self, run: Run) -> None:
        """The supervisor is gone: complete what it left undone, then say that the run is over."""
        run.close_pidfd()
        try:
            with trio.move_on_after(_LOCK_WAIT_S):
                while run.lock is None:
                    run.lock = state.take_lock(run.folder)
                    if run.lock is None:
                        await trio.sleep(_UNIDENTIFIED_POLL_S)
            written = await trio.to_thread.run_sync(self._close_record, run)
            while not written:
                # Not over for its user as long as nothing says so; begun again, it would be twice.
                await trio.sleep(_ROOM_RETRY_S)
                outcome, error = run.record["state"], run.record["error"]
                written = await trio.to_thread.run_sync(run.write_end, outcome, error)
            # Even when the supervisor has tried: it may hang in a mount that is no more. A process
            # that starts now finds the one there is; later ones are `recover`'s.
            if run.lock is not None and not run.record["private"].get("published"):
                await self._publish_quickly(run.folder, run.lock)
            await trio.to_thread.run_sync(self._prune, run.folder)
        except OSError:
            log.exception("run could not be closed pod=%r run=%s", run.pod, run.id)
            if run.record["state"] not in state.ENDED:
                state.end_record(run.record, state.LOST, "its record cannot be used")
        finally:
            run.let_go()
        if debts.owes(run.record):
            self._started().start_soon(self._settle_debts, run.folder)
        if self._on_over is not None:
            try:
                await self._on_over(run.pod)
            except Exception:
                log.exception("on_over failed pod=%r", run.pod)
        self._forget(run)

    async def _settle_debts(self, folder: Path) -> None:
        await debts.settle(folder, self._environment, self._publish_quickly)

    def _forget(self, run: Run) -> None:
        del self._active[run.pod]
        log.info(
            "run ended pod=%r run=%s state=%s exit_code=%s signal=%s error=%r",
            *(run.pod, run.id),
            *(run.record.get(key) for key in ("state", "exit_code", "signal", "error")),
        )
        run.ended.set()
        try:
            self._on_end(run.pod)
        except Exception:
            log.exception("on_end failed pod=%r", run.pod)

    def _close_record(self, run: Run) -> bool:
        """Load the final record; if the supervisor wrote none, write that the run was lost. False
        when there is no room for it."""
        run.record = state.read_record(run.folder) or run.record
        if run.record["state"] in state.ENDED or run.lock is None:
            return True
        state.kill_leftovers(run.id, run.record["private"].get("supervisor"))
        if run.record.get("golem"):
            try:
                end_agreements(run.folder, run.record, self._environment())
            except Exception:
                # Of any kind: the record may be half written, the settings may lack the app-key.
                log.exception("agreements may be open pod=%r run=%s", run.pod, run.id)
        if run.cancelled:
            return run.write_end(state.CANCELLED, "killed: it did not end in time")
        return run.write_end(state.LOST, "the supervisor died")

    def _fail(self, run: Run, error: str) -> None:
        log.error("run failed pod=%r run=%s error=%r", run.pod, run.id, error)
        # Without the lock a supervisor is there after all, and has the say.
        if run.lock is not None:
            run.write_end(state.FAILED, error)

    def _scan(self) -> tuple[list[Run], list[Path], list[Path]]:
        """The runs that somebody minds, the folders of those not yet copied to their pods, and of
        those that may have left agreements open."""
        self._runs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        alive: list[Run] = []
        unpublished: list[Path] = []
        owing: list[Path] = []
        for parent in sorted(p for p in self._runs_dir.iterdir() if p.is_dir()):
            for draft in parent.glob(f"{_NEW}*"):
                shutil.rmtree(draft, ignore_errors=True)
            for folder in _run_folders(parent):
                record = state.read_record(folder)
                if record is None:
                    log.warning("run has no readable record folder=%s", folder)
                    continue
                run = Run(record["pod"], record["id"], folder, record)
                run.lock = state.take_lock(folder)
                if run.lock is None:
                    alive.append(run)
                    continue
                if record.get("golem") and record["state"] not in state.ENDED:
                    alive.append(run)
                    continue
                self._close_record(run)
                os.close(run.lock)
                if not run.record["private"].get("published"):
                    unpublished.append(folder)
                if debts.owes(run.record) and debts.is_recent(folder):
                    owing.append(folder)
        return alive, unpublished, owing

    async def _publish_all(self, folders: list[Path]) -> None:
        for folder in folders:
            lock = None
            try:
                lock = state.take_lock(folder)
                if lock is not None:
                    await self._publish(folder, lock, self._publish_s)
            except OSError:
                log.exception("run not copied to its pod folder=%s", folder)
            finally:
                if lock is not None:
                    os.close(lock)

    async def _publish_quickly(self, folder: Path, lock: int) -> None:
        await self._publish(folder, lock, min(_QUICK_PUBLISH_S, self._publish_s))

    async def _publish(self, folder: Path, lock: int, timeout_s: float) -> None:
        arguments = [str(self._mountpoint), str(timeout_s)]
        process = await open_supervisor(folder, lock, arguments)
        if await process.wait():
            private = (state.read_record(folder) or {}).get("private", {})
            log.warning(
                "run not copied to its pod yet folder=%s: %s", folder, private.get("problem")
            )

    def _prune(self, ended: Path) -> None:
        for age, folder in enumerate((f for f in _run_folders(ended.parent) if f != ended), 1):
            record = state.read_record(folder)
            if age < self._keep or record is None or record["state"] not in state.ENDED:
                continue
            # One that never reached its pod is kept for longer, but not for ever.
            if record["private"].get("published") or age >= 5 * self._keep:
                shutil.rmtree(folder, ignore_errors=True)


def _run_folders(parent: Path) -> list[Path]:
    """The run folders of a pod, the newest first."""
    try:
        names = newest_first(n for n in os.listdir(parent) if not n.startswith("."))
    except FileNotFoundError:
        return []
    return [parent / name for name in names]
