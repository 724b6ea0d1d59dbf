"""``foreach``: one task per file, over several providers, each result taken once.

asyncio; imports the other ``provider_*`` modules. A task is in one of four states and only moves
waiting → running → done, failed, or waiting again; it is running on one lane at most, so its
results cannot be taken twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from yapapi.script.command import SendFile

from cpodfs.runs.provider_errors import RunFailed
from cpodfs.runs.provider_files import NotThere, TaskLog, sha256_in
from cpodfs.runs.provider_market import FAILED, STRIKES
from cpodfs.runs.provider_remote import Remote, Say
from cpodfs.runs.provider_script import IF_WELL, INCOMING, words_for
from cpodfs.runs.provider_status import Hired
from cpodfs.runs.provider_work import Shop, Watch

LANE_FAILURES = 8
"""So many providers in a row that fail before they have done anything end the run."""
_LOG_EVERY_S = 0.2


@dataclass
class Task:
    """``failed_on``: the ids of the providers that have failed it, and do not get it again.
    ``exited_on``: those where the program did, which may be the task's own fault."""

    number: int
    path: str
    state: str = "waiting"
    attempts: int = 0
    failed_on: set[str] = field(default_factory=set)
    exited_on: set[str] = field(default_factory=set)
    error: str | None = None


class EachWork:
    """The tasks and who does them. ``over`` is set when each is done or failed for good."""

    def __init__(self, shop: Shop, paths: list[str], poll_s: float, retries: int) -> None:
        self.over = asyncio.Event()
        self.tasks = [Task(number, path) for number, path in enumerate(paths, 1)]
        self._shop = shop
        self._poll_s = poll_s
        self._retries = retries
        self._blamed: Counter[str] = Counter()
        self._running: dict[str, Task] = {}
        self._barren = 0
        self._count()

    @property
    def exit_code(self) -> int:
        if self._in("failed"):
            return 1
        return FAILED if self._shop.missing() else 0

    @property
    def error(self) -> str | None:
        failed, missing = self._in("failed"), self._shop.missing()
        if not failed:
            return missing
        first = failed[0]
        summary = (
            f"{len(failed)} of {len(self.tasks)} tasks failed; the first: {first.path}: "
            f"{first.error} ({first.attempts} attempts), "
            f"see {self._shop.job.log}/tasks/{first.number}.log"
        )
        return f"{summary}; {missing}" if missing else summary

    def _in(self, *states: str) -> list[Task]:
        return [task for task in self.tasks if task.state in states]

    def lanes_wanted(self) -> int:
        return len(self._in("waiting", "running"))

    def _count(self) -> None:
        states = Counter(task.state for task in self.tasks)
        done, failed = states["done"], states["failed"]
        status, total = self._shop.reporter.status, len(self.tasks)
        left = total - done - failed
        status.tasks = {"total": total, "done": done, "failed": failed, "left": left}
        status.failed = [
            {"task": task.number, "file": task.path, "error": task.error}
            for task in self._in("failed")
        ]
        self._shop.reporter.changed()
        if not left:
            self.over.set()

    # -- one provider -----------------------------------------------------------------------------

    async def lane(self, remote: Remote, hired: Hired) -> None:
        await self._shop.set_up(remote)
        while (task := self._next(hired)) is not None:
            log = _Log(self._shop, task, hired)
            try:
                await self._do(remote, hired, task, log)
            except NotThere:
                del self._running[hired.agreement]
                task.attempts = self._retries
                self._failed(task, hired, "the file is not there any more: not tried")
            finally:
                await log.close()

    async def _do(self, remote: Remote, hired: Hired, task: Task, log: _Log) -> None:
        begun, job = time.monotonic(), self._shop.job
        digest = await self._shop.in_pod(sha256_in, job.pod, task.path)
        words, key = words_for(job.argv, task.path, job.script), f"{task.number}.{task.attempts}"
        begin = [
            SendFile(str(job.pod / task.path), INCOMING),
            Say("task", key, digest, task.path, job.output, *words),
        ]
        watch = Watch(self._shop, remote, log.add, IF_WELL)
        exit_code = await watch.to_its_end(self._poll_s, begin)
        # Before the task is over, for with the last one the lane may be ended.
        await log.close()
        self._finish(task, hired, exit_code, time.monotonic() - begun)

    def wants(self, provider_id: str) -> bool:
        """Whether there is a task for this provider. It is not given what it has failed, nor
        anything after `STRIKES` failures."""
        fresh = any(provider_id not in task.failed_on for task in self._in("waiting"))
        return fresh and self._blamed[provider_id] < STRIKES

    def _next(self, hired: Hired) -> Task | None:
        """The next task for a provider; None when there is none for it."""
        waiting = self._in("waiting") if self.wants(hired.id) else []
        task = next((task for task in waiting if hired.id not in task.failed_on), None)
        if task is not None:
            task.state = "running"
            self._running[hired.agreement] = task
        return task

    def nobody(self, why: str) -> None:
        """Nobody is left to be hired. Raises RunFailed unless some tasks were tried."""
        tried = [task for task in self._in("waiting") if task.attempts]
        if len(tried) < len(self._in("waiting")):
            raise RunFailed(why)
        for task in tried:
            task.state = "failed"
            self._say(f"{task.path}: {task.error}, is given up: {why}")
        self._count()

    def _finish(self, task: Task, hired: Hired, exit_code: int | None, took_s: float) -> None:
        del self._running[hired.agreement]
        self._barren = 0
        hired.done += 1
        if exit_code == 0:
            task.state, task.error = "done", None
            # It was not the task's fault, then.
            self._blamed.update(task.exited_on)
            self._say(f"{task.path}: done by {hired.name} in {took_s:.2f} s")
            self._count()
        else:
            task.exited_on.add(hired.id)
            self._failed(task, hired, f"exit code {exit_code}")

    def _failed(self, task: Task, hired: Hired, error: str) -> None:
        task.attempts += 1
        task.failed_on.add(hired.id)
        task.error = f"{error} on {hired.name}"
        again = task.attempts <= self._retries
        task.state = "waiting" if again else "failed"
        more = "will be tried again" if again else "is given up"
        self._say(f"{task.path}: {task.error}, {more}")
        self._count()

    def _say(self, text: str) -> None:
        self._shop.reporter.log("stdout", f"{text}\n".encode(errors="backslashreplace"))

    def lane_ended(self, hired: Hired, error: str | None) -> None:
        task = self._running.pop(hired.agreement, None)
        if task is not None and error is None:
            # Cancelled: nobody is to blame.
            task.state = "waiting"
        elif task is not None:
            self._failed(task, hired, str(error))
        if error is not None:
            self._blamed[hired.id] += 1
        if error is not None and not hired.done:
            self._barren += 1
            if self._barren >= LANE_FAILURES:
                raise RunFailed(f"{self._barren} providers in a row failed; the last: {error}")


class _Log:
    """What a task prints, into its log file, soon. A pod that cannot be written is tried again."""

    def __init__(self, shop: Shop, task: Task, hired: Hired) -> None:
        self._shop = shop
        self._file = TaskLog(shop.job.pod, shop.job.log, task.number)
        attempt = f", attempt {task.attempts + 1}" if task.attempts else ""
        self._pending = f"cpodfs: {task.path} on {hired.name}{attempt}\n".encode()
        self._news = asyncio.Event()
        self._closing = False
        self._writer = asyncio.create_task(self._write())

    def add(self, _stream: str, data: bytes) -> None:
        self._pending += self._shop.within_limit(data)
        self._news.set()

    async def close(self) -> None:
        self._closing = True
        self._news.set()
        await self._writer

    async def _write(self) -> None:
        while True:
            if not self._closing:
                await self._news.wait()
                self._news.clear()
            data, self._pending = self._pending, b""
            if data:
                await self._shop.in_pod(self._file.append, data)
            elif self._closing:
                return
