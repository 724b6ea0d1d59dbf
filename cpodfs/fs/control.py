"""Pods as things that run: the control file ``.run`` and the ``user.cpodfs.*`` attributes.

Imports the tree, recipes and runs. ``.run`` is never stored anywhere: it exists exactly while a run
is in progress. Its inode number (`RunFiles.ino`) has ``RUN_INO_BIT``, which no stored inode has, and
is never used for another ``.run``, which the kernel would take for the one it has seen deleted.
"""

from __future__ import annotations

import errno
import json
import logging
import shlex
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cpodfs import words
from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Inode, Remote
from cpodfs.errors import CpodfsError, RecipeMissing
from cpodfs.fs.guard import Guard, PodRecipe
from cpodfs.fs.pods import check_writable, inode_of, oserror
from cpodfs.fs.tree import Tree
from cpodfs.paths import RUN_NAME
from cpodfs.recipe import RECIPE_LIMIT_BYTES, parse_recipe, recipes_in_order
from cpodfs.runs import changes
from cpodfs.runs.manager import RunManager
from cpodfs.runs.payment import Payments
from cpodfs.runs.spawn import How

log = logging.getLogger(__name__)

RUN_INO_BIT = 1 << 62
_POD_BITS = 40
_TURNS = 1 << (62 - _POD_BITS)
RM_WAIT_S = 1.0
"""``rm .run`` waits so long for the run's end, so that a script may go on at once (touch it again,
remove the pod). No longer: the kernel holds the pod's directory meanwhile."""
CONTROL_HANDLE_BIT = 1 << 62
XATTR_PREFIX = b"user.cpodfs."
REQUEST = b"request."
PATH_COMMANDS = frozenset({b"refresh"})
"""The commands about a path, which may be given to that; all others are the root's."""


@dataclass(slots=True)
class _Starter:
    """Who created ``.run``: ``touch`` sets its times through the handle that it still has open."""

    pod: int
    pid: int


def pod_of(ino: int) -> int:
    """The inode number of the pod whose ``.run`` has, or had, this one."""
    return ino & ((1 << _POD_BITS) - 1)


class RunFiles:
    """The ``.run`` of every pod, and what is known of whose they are."""

    def __init__(self, tree: Tree, runs: RunManager, guard: Guard, payments: Payments) -> None:
        self._tree = tree
        self._runs = runs
        self._guard = guard
        self._payments = payments
        self._starting: set[int] = set()
        self._starters: dict[int, _Starter] = {}
        self._snapshots: dict[int, bytes] = {}
        self._turns: dict[int, int] = {}
        self._next_handle = CONTROL_HANDLE_BIT
        self.errors: dict[int, str] = {}

    def is_run_name(self, parent: int, name: str) -> bool:
        """Whether ``name`` in this directory is the control file's."""
        if name != RUN_NAME or parent == ROOT:
            return False
        inode = self._tree.store.get(parent)
        return inode is not None and inode.parent == ROOT

    def ino(self, pod: int) -> int:
        """The inode number of the pod's ``.run``, another one after each start and each ``rm``."""
        return RUN_INO_BIT | self._turns.get(pod, 0) << _POD_BITS | pod

    def _turn(self, pod: int) -> None:
        self._turns[pod] = (self._turns.get(pod, 0) + 1) % _TURNS

    def exists(self, pod: int) -> bool:
        return self._runs.in_progress(self._pod_name(pod))

    def check_idle(self, parent: int, name: str) -> None:
        """Raise EBUSY for a pod (``name`` in the root) that must stay where it is: it is running."""
        if parent == ROOT and self._runs.in_progress(name):
            raise oserror(errno.EBUSY, name)

    def state(self, pod: int) -> bytes:
        """The state of the run in progress as one line of JSON. Raises ENOENT when there is none."""
        current = self._runs.current(self._pod_name(pod))
        if current is None:
            raise oserror(errno.ENOENT, RUN_NAME)
        if isinstance(golem := current.get("golem"), dict):
            current["golem"] = _with_short_costs(golem)
        return json.dumps(current).encode() + b"\n"

    async def create(self, pod: int, pid: int) -> int:
        """Start a run: what ``touch .run`` means. Returns a handle; raises why it cannot run."""
        await self.start(pod, {})
        return self._handle(_Starter(pod, pid))

    async def start(self, pod: int, changed: Mapping[str, str]) -> tuple[str, str]:
        """Start a run with these settings changed; its id, and its log folder in the pod."""
        running = self.exists(pod) or self._guard.is_running(self._pod_name(pod))
        if running or pod in self._starting:
            raise oserror(errno.EBUSY, RUN_NAME)
        self._starting.add(pod)
        begun = False
        try:
            what = await self.recipe(pod)
            sandbox = await self._guard.admit(what)
            recipe, env = changes.apply(what.recipe, changed)
            env |= await self._payments.variables(recipe)
            name = self._pod_name(pod)
            for warning in recipe.warnings:
                log.warning("recipe pod=%r: %s", name, warning)
            run_id = self._runs.begin(name, recipe, How(env, changed, sandbox))
            begun = True
            self._turn(pod)
        except CpodfsError as error:
            self._refused(pod, str(error))
            raise
        except OSError as error:
            self._refused(pod, f"{self._pod_name(pod)}: {error.strerror}{advice(error)}")
            raise
        finally:
            self._starting.discard(pod)
            if not begun:
                self._guard.let_go(self._pod_name(pod))
        self.errors.pop(pod, None)
        log.info("run started pod=%r run=%s", name, run_id)
        return run_id, f"{recipe.log}/{run_id}"

    def record(self, pod: str, run_id: str) -> dict[str, Any] | None:
        """The driver's own record of a run."""
        return self._runs.record(pod, run_id)

    def _refused(self, pod: int, reason: str) -> None:
        store = self._tree.store
        self.errors = {p: text for p, text in self.errors.items() if store.get(p) is not None}
        self.errors[pod] = reason
        log.warning("run refused pod=%r: %s", self._pod_name(pod), reason)

    # -- whose pods they are ----------------------------------------------------------------------

    def made(self, pod: str) -> None:
        """A pod was made through this mount: it is the user's own."""
        self._note(lambda: self._guard.book.own(pod))

    def moved(self, old: str, new: str) -> None:
        """A pod that the server has not heard of got another name."""
        self._note(lambda: self._guard.book.rename(old, new))

    def not_ours(self, pods: Iterable[str]) -> None:
        """Under these names pods were deleted, or made elsewhere."""
        for pod in pods:
            self._note(partial(self._guard.book.forget, pod))

    def _note(self, change: Callable[[], object]) -> None:
        try:
            change()
        except OSError as error:
            log.warning("whose pod it is was not noted: %s", error)

    # -- the recipe -------------------------------------------------------------------------------

    async def recipe(self, pod: int) -> PodRecipe:
        """The pod's recipe. Raises EROFS in a received pod, RecipeError or a DfsError."""
        check_writable(self._tree.store, pod)
        await self._tree.directory(pod)
        files = {c.name: c for c in self._tree.store.children(pod) if c.is_file and c.name}
        chosen = recipes_in_order(files)
        if not chosen:
            raise RecipeMissing(
                f"{self._pod_name(pod)}: not a compute pod: "
                "there is no recipe.json, .recipe or *.recipe at its root"
            )
        raw = await self._tree.files.read_whole(files[chosen[0]].ino, RECIPE_LIMIT_BYTES + 1)
        recipe = parse_recipe(raw, file=chosen[0], others=chosen[1:])
        return PodRecipe(inode_of(self._tree.store, pod), recipe, raw)

    async def cancel(self, pod: int) -> None:
        """``rm .run``: the file goes when the run has ended, which is waited for a little."""
        name = self._pod_name(pod)
        if not self._runs.cancel(name):
            raise oserror(errno.ENOENT, RUN_NAME)
        self._turn(pod)
        await self._runs.wait_end(name, RM_WAIT_S)

    def open(self, pod: int, *, writing: bool) -> int:
        """A handle for reading a snapshot of the state; to write is to touch again."""
        if not self.exists(pod):
            # It ended after the look-up: at ESTALE the kernel looks again, and then creates it.
            raise oserror(errno.ESTALE, RUN_NAME)
        if writing:
            raise oserror(errno.EBUSY, RUN_NAME)
        snapshot = self.state(pod)
        handle = self._handle(None)
        self._snapshots[handle] = snapshot
        return handle

    def read(self, handle: int, offset: int, size: int) -> bytes:
        return self._snapshots.get(handle, b"")[offset : offset + size]

    def may_touch(self, pod: int, pid: int) -> bool:
        """Whether a change of the file's times belongs to the touch that started the run."""
        return any(s.pod == pod and s.pid == pid for s in self._starters.values())

    def release(self, handle: int) -> None:
        self._starters.pop(handle, None)
        self._snapshots.pop(handle, None)

    def _handle(self, starter: _Starter | None) -> int:
        handle = self._next_handle
        self._next_handle += 1
        if starter is not None:
            self._starters[handle] = starter
        return handle

    def _pod_name(self, pod: int) -> str:
        return inode_of(self._tree.store, pod).name or ""


def _with_short_costs(golem: Mapping[str, Any]) -> dict[str, Any]:
    """A run's books as they are shown while it goes on; `run.json` has them to the last digit."""
    found = dict(golem)
    for key in ("spent", "accepted"):
        if shown := words.cost(found.get(key)):
            found[key] = float(shown)
    if isinstance(providers := found.get("providers"), list):
        found["providers"] = [
            _with_short_costs(one) if isinstance(one, dict) else one for one in providers
        ]
    return found


def advice(error: OSError) -> str:
    """What to do about a refusal, to be added to what is said of it."""
    if error.errno == errno.EROFS:
        return "; it was received: make a pod of your own of it with cpodfs fork"
    return ""


class Attributes:
    """The computed extended attributes; read-only but for commands given to the mount."""

    def __init__(self, tree: Tree, runs: RunFiles) -> None:
        self._tree = tree
        self._runs = runs
        self.commands: dict[bytes, Callable[[int, bytes], Awaitable[None]]] = {}
        self.reports: dict[bytes, Callable[[], object]] = {}
        self.ask: Callable[[bytes, bytes], Awaitable[None]] | None = None
        self.answer: Callable[[bytes], bytes | None] = lambda _key: None

    def get(self, inode: Inode, name: bytes) -> bytes | None:
        key = name.removeprefix(XATTR_PREFIX)
        if key == b"state":
            return self.state(inode).encode()
        if key == b"error":
            error = self._error(inode)
            return None if error is None else error.encode(errors="backslashreplace")
        if inode.ino != ROOT:
            return None
        if key.startswith(REQUEST):
            return self.answer(key)
        return json.dumps(self.reports[key]()).encode() if key in self.reports else None

    async def set(self, inode: Inode, name: bytes, value: bytes) -> None:
        """A command, given as an attribute. Raises EPERM for what is only to be read."""
        key = name.removeprefix(XATTR_PREFIX)
        # In a sandbox the root is out of reach: its program has no say in what concerns us all.
        root = inode.ino == ROOT
        if key.startswith(REQUEST) and root and self.ask is not None:
            await self.ask(key, value)
            return
        command = self.commands.get(key)
        if command is None or not (root or key in PATH_COMMANDS):
            raise oserror(errno.EPERM)
        await command(inode.ino, value)

    def state(self, inode: Inode) -> str:
        """``clean``, ``dirty``, ``uploading``, ``uploaded`` (FairOS has it, Swarm not yet), ``error`` or
        ``doubtful`` (the server does not show it any more)."""
        if inode.ino in self._tree.engine.uploading():
            return "uploading"
        if inode.error is not None and inode.dirty:
            return "error"
        if inode.dirty:
            return "dirty"
        if self._doubtful(inode) is not None:
            return "doubtful"
        remote = self._tree.store.remote_of(inode.ino)
        return "clean" if remote is None or remote.in_swarm else "uploaded"

    def _doubtful(self, inode: Inode) -> Remote | None:
        """The object, or the directory above it, that the server does not show any more."""
        remote = self._tree.store.remote_of(inode.ino)
        return self._tree.store.doubtful_above(remote.rid) if remote is not None else None

    def _error(self, inode: Inode) -> str | None:
        refused = self._runs.errors.get(inode.ino)
        if refused is not None:
            return refused
        if inode.dirty:
            return inode.error
        doubtful = self._doubtful(inode)
        if doubtful is None:
            return None
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(doubtful.absent_s))
        path = shlex.quote("/".join(self._tree.store.remote_path(doubtful.rid)))
        return (
            f"the server has not shown {path} since {since}; what is cached is kept; "
            "if it was deleted elsewhere: cpodfs refresh --accept-deletions PATH"
        )
