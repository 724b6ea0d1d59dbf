"""The program of a run as a process, with all that it starts: how it is asked to end, and ended.

Imports `state` and the standard library, for the supervisor, which is the subreaper: as a process of
the program dies, its children become ours. A pid is only signalled while it is surely still its own.
"""

from __future__ import annotations

import os
import select
import signal
import time

from cpodfs.runs import state

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

_INTERRUPT_SHARE = 0.75
"""Of the grace: from SIGINT to SIGTERM. A requestor of yapapi's ends its agreements and pays at the
first, as at Ctrl-C, and drops everything at the second."""
_KILL_LIMIT_S = 5.0
_WATCH_S = 1.0
"""How often a sandbox is looked at."""
_SANDBOX_PROCESSES = 2
"""What a sandbox has inside at least: its own init and the program."""


class Program:
    """``status``: as `subprocess` has it, once it has ended. ``cancelled``: it was asked to end.

    ``beyond_us``: it became another user, whom we may not signal. ``sandboxed``: what was started is
    a sandbox around it. ``meddled``: it stopped the sandbox, and was killed for that. ``others``:
    children of ours that are not the program's, and are left alone.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, sandboxed: bool = False) -> None:
        self.pid = process.pid
        self.status: int | None = None
        self.beyond_us = False
        self.meddled = False
        self.others: set[int] = set()
        self._watch_at = time.monotonic()
        self._process = process
        self._sandboxed = sandboxed
        self._grace_ends: float | None = None
        self._term_at: float | None = None
        self._killed = False

    @property
    def cancelled(self) -> bool:
        return self._grace_ends is not None

    def cancel(self, grace_s: float) -> None:
        """SIGINT now, SIGTERM later, SIGKILL after ``grace_s``; see `tick`. Once only."""
        if self.cancelled:
            return
        now = time.monotonic()
        self._grace_ends = now + grace_s
        self._term_at = now + grace_s * _INTERRUPT_SHARE
        self._ask(signal.SIGINT)

    def cancel_alone(self, grace_s: float) -> None:
        """SIGTERM to it and not to what it started; SIGKILL to all after ``grace_s``. Once only."""
        if self.cancelled:
            return
        self._grace_ends = time.monotonic() + grace_s
        if self.status is None:
            self._send(self.pid, signal.SIGTERM)

    def tick(self) -> None:
        """Send the signals that are due."""
        now = time.monotonic()
        if self._term_at is not None and now >= self._term_at:
            self._term_at = None
            self._ask(signal.SIGTERM)
        if self._sandboxed and now >= self._watch_at:
            self._watch_at = now + _WATCH_S
            self._watch()
        if self._grace_ends is not None and now >= self._grace_ends:
            self._kill()

    def next_tick_s(self) -> float | None:
        """How long until `tick` or `over` may have news; None for ever."""
        if self._grace_ends is None:
            return _WATCH_S if self._sandboxed else None
        if self._killed:
            return _KILL_LIMIT_S / 5
        due = self._grace_ends if self._term_at is None else min(self._term_at, self._grace_ends)
        left = max(0.0, due - time.monotonic())
        return min(left, _WATCH_S) if self._sandboxed else left

    def over(self) -> bool:
        """Whether there is nothing more to wait for: it has ended and, if asked, its children too."""
        if self.status is None:
            late = self._killed and self._grace_ends is not None
            return late and time.monotonic() >= (self._grace_ends or 0) + _KILL_LIMIT_S
        # Cancelled: what the program started may still be putting its affairs in order.
        return self._grace_ends is None or self._killed or not self.children()

    def children(self) -> list[int]:
        """The pids of what the program has started and left to us, and of itself."""
        return [pid for pid in state.children(os.getpid()) if pid not in self.others]

    def reap(self) -> None:
        """Collect dead children, ours and those that the program left to us."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid == self.pid:
                # Still a zombie, so the group's number cannot have been given to others.
                if self._grace_ends is None:
                    self._signal_group(signal.SIGKILL)
                else:
                    self._pass_on_term()
            _, status = os.waitpid(dead.si_pid, 0)
            self.others.discard(dead.si_pid)
            if dead.si_pid == self.pid:
                self.status = self._process.returncode = os.waitstatus_to_exitcode(status)

    def kill_children(self, wake: int) -> None:
        """Kill all that is left, until nothing is or `_KILL_LIMIT_S` is over. ``wake``: readable at
        SIGCHLD."""
        deadline = time.monotonic() + _KILL_LIMIT_S
        while time.monotonic() < deadline:
            self.reap()
            pids = self.children()
            if not pids:
                return
            for pid in pids:
                self._send(pid, signal.SIGKILL)
            if select.select([wake], [], [], 0.05)[0]:
                os.read(wake, 4096)

    def _ask(self, number: int) -> None:
        if self.status is not None:
            return
        if not self._sandboxed:
            self._signal_group(number)
            return
        inside = state.descendants(self.pid)
        if len(inside) < _SANDBOX_PROCESSES:
            # The sandbox is still being made, and would swallow it.
            self._kill()
        # Not to the sandbox's own process: it would die of it, and the exit code would be lost.
        for pid in inside:
            self._send(pid, number)

    def _watch(self) -> None:
        """A program may trace the first process in there: with that stopped nobody would hear of its
        end. From outside the sandbox as a whole may be stopped, as any program."""
        if self.status is not None or self._killed or state.is_stopped(self.pid):
            return
        if any(state.is_stopped(first) for first in state.children(self.pid)):
            self.meddled = True
            self._kill()

    def _pass_on_term(self) -> None:
        # Those in a session of their own did not get the group's signals.
        for pid in self.children():
            if pid != self.pid:
                self._send(pid, signal.SIGTERM)

    def _kill(self) -> None:
        self._killed = True
        if self.status is None:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            self.beyond_us = True

    def _send(self, pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            self.beyond_us = True
