"""Random histories of two sessions, with faults and kills: nothing is stranded, all is uploaded.

``python -m tests.bench.histories --count 10000``. No mount and no network: the driver's own parts on
a server in this process, in virtual time (`tests.simulated`). Each history is made from its seed alone.
At every step, whatever is not settled must be scheduled, or wait for something that is
(`Engine.stranded`); when the faults have ended, all gets uploaded, and the two trees are the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import click
import trio

from cpodfs.cache import claims
from cpodfs.cache.content import Content
from cpodfs.cache.folder import Cache
from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Inode, Store
from cpodfs.config import Settings
from cpodfs.errors import CpodfsError
from cpodfs.fs.tree import RENAME_EXCHANGE, Times, Tree
from cpodfs.parts import Parts
from cpodfs.sync.doubt import DISTRUST_S
from cpodfs.sync.drain import drain
from cpodfs.sync.left import Left, left
from tests.simulated import Fate, Simulated, virtual_time

NAMES = ("a", "b", "c", "d")
PODS = ("p", "q")
HIDDEN = b"hid"
"""Of no size that another version has."""
STEPS = 40
STALL_S = 900.0
ROUNDS = 8
LONGEST_S = 15
"""One takes a tenth of a second."""
Step = Callable[[], Awaitable[object]]


class Stranded(AssertionError):
    """Something is not settled, and nobody will ever see to it."""


class Differ(AssertionError):
    """The server's tree is not the local one."""


class Endless(BaseException):
    """Something goes round and round; nobody may take it for a mistake of one object's work."""


@dataclass
class History:
    """One history. ``log`` has its steps, oldest first."""

    server: Simulated
    folder: Path
    seed: int
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.fate = Fate(random.Random(self.seed + 1))
        self.calm = Fate(random.Random(self.seed + 2))
        self.user = self.server.account()
        self.other = self.server.client(self.user, self.calm)
        self.written = 0
        self.alone = self.dice.random() < 0.4
        self.expected: dict[str, int | None] | None = None
        self.handles: list[int] = []
        self.settings = Settings(
            *("http://simulated", self.user.name, self.folder / "mnt", self.folder / "cache"),
            writeback_delay_s=self.dice.choice([0.0, 0.3, 3.0]),
            attr_ttl_s=self.dice.choice([0.5, 5.0, 60.0]),
            uploads=self.dice.choice([1, 4]),
            changes=self.dice.choice([1, 2, 8]),
        )
        self.fate.latency_s = self.dice.choice([0.0, 0.2, 1.0])

    async def run(self) -> None:
        """Raises Stranded or Differ."""
        lives = self.dice.choice([1, 1, 2, 3])
        for life in range(lives):
            async with self._driver():
                self.check()
                if not life and self.dice.random() < 0.7:
                    await self._begin()
                for _ in range(self.dice.randrange(STEPS // lives)):
                    await self._step()
                if life == lives - 1:
                    await self._finish()
                self.say("end" if life == lives - 1 else "kill")

    def say(self, text: str) -> None:
        self.log.append(f"{trio.current_time():9.2f} {text}")

    # -- the driver -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _driver(self) -> AsyncIterator[None]:
        """A driver's parts on the cache that is there; they die in the middle of their work."""
        (self.folder / "cache").mkdir(exist_ok=True)
        store = Store(self.folder / "cache/meta.db")
        content = Content(self.folder / "cache/content")
        claims.settle(self.folder / "cache", store, content)
        cache = Cache(self.folder / "cache", store, content)
        client = self.server.client(self.user, self.fate)
        self.parts = Parts(self.settings, cache, client, dict)
        self.store, self.engine = store, self.parts.engine
        self.tree: Tree = self.parts.operations._tree
        self.handles = []
        try:
            async with trio.open_nursery() as nursery:
                await self.parts.run(nursery)
                yield
                nursery.cancel_scope.cancel()
        finally:
            if store._checkpointer is not None:
                store._checkpointer.close()
            store._db.close()  # nothing says that this was the end
            for fd in store._files:
                os.close(fd)

    async def _begin(self) -> None:
        """Something that the server has already."""
        await self.tree.mkdir(ROOT, "p", 0o755)
        for _ in range(self.dice.randrange(12)):
            await self._try(self.dice.choice([self._mkdir, self._write]))
        await drain(self.engine, STALL_S)

    async def _finish(self) -> None:
        """Faults end; what is pending is uploaded, what is there is looked at, until both agree."""
        self.fate.calm()
        for handle in self.handles:
            self.tree.handles.release(handle)
        self.say("calm")
        for number in range(ROUNDS):
            if not await drain(self.engine, STALL_S):
                waiting = left(self.engine, self.store, 1000)
                if all(self._is_explained(one) for one in waiting):
                    return  # deleted elsewhere: kept until that is sure, and ``status`` says so
                self.say("not drained")
                raise Stranded(f"not uploaded: {self._left()}")
            self.check()
            await self._look_everywhere()
            if self.engine.is_idle() and not self._difference():
                return
            self.say(f"round {number}: {self._difference()}")
            await trio.sleep(DISTRUST_S / 2)
        raise Differ(str(self._difference()))

    async def _look_everywhere(self) -> None:
        with contextlib.suppress(CpodfsError):  # what was asked for before the faults ended
            await self.parts.lister.refresh_from_others(ROOT)
        for pod in self.store.children(ROOT):
            with contextlib.suppress(CpodfsError):
                await self.parts.lister.refresh_from_others(pod.ino)
            pending = [pod.ino]
            while pending:
                ino = pending.pop()
                with contextlib.suppress(CpodfsError):
                    await self.parts.lister.refresh(ino)
                pending += [c.ino for c in self.store.children(ino) if c.is_dir]

    def _difference(self) -> list[str]:
        here, there = self._contents(), self.server.contents(self.user)
        said = [f"only here: {p}" for p in here if p not in there and not self._is_doubtful(p)]
        said += [f"only there: {p}" for p in there if p not in here]
        said += [
            f"{p}: {here[p]!r:.40} {there[p]!r:.40}"
            for p in here
            if there.get(p, here[p]) != here[p] and not self._is_doubtful(p)
        ]
        return [line for line in said if not line.endswith("/.run")]

    def _is_explained(self, one: Left) -> bool:
        """Whether ``status`` says of something that is left that it was deleted elsewhere, or why
        that is not sure."""
        if "--accept-deletions" in one.reason:
            return True
        if one.failed and "delete pod: file not found" in one.reason:
            return True  # the server has lost a file that it lists, and cannot delete such a pod
        return (one.failed or "(" in one.reason) and self._is_doubtful(one.path)

    def _is_doubtful(self, path: str) -> bool:
        """Whether something is kept although the server does not show it, or is below what is."""
        ino = ROOT
        for name in path.split("/"):
            inode = self.store.child(ino, name)
            if inode is None:
                return False
            remote, ino = self.store.remote_of(inode.ino), inode.ino
            if remote is not None and remote.absent_s is not None:
                return True
        return False

    def _contents(self) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        pending = [ROOT]
        while pending:
            for child in self.store.children(pending.pop()):
                path = self.store.path(child.ino)
                if child.is_dir:
                    found[path] = None
                    pending.append(child.ino)
                elif child.cached:
                    found[path] = Path(self.tree.files._content.path(child.ino)).read_bytes()
                else:
                    remote = self.store.remote_of(child.ino)
                    there = self.server.contents(self.user).get(path)
                    same = remote is not None and there is not None and len(there) == child.size
                    found[path] = there if same else b"(not here)"
        return found

    def _paths(self) -> dict[str, int | None]:
        """What is seen here: sizes of files, None of directories."""
        found: dict[str, int | None] = {}
        pending = [ROOT]
        while pending:
            for child in self.store.children(pending.pop()):
                if child.is_dir:
                    pending.append(child.ino)
                size = None if child.is_dir else self.tree.files.size(child)
                found[self.store.path(child.ino)] = size
        return found

    def _left(self) -> list[str]:
        store = self.store
        said = [
            f"{store.path(i.ino)} ino={i.ino} dirty={i.dirty} {i.error or ''}"
            f" chain={self.engine._waits.chain(('ino', i.ino))}"
            for i in store.pending_inodes()
        ]
        return said + [
            f"{store.remote_path(rid)} {store.remote(rid)} chain={self.engine._waits.chain(('rid', rid))}"
            for rid in store.orphans()
        ]

    def check(self) -> None:
        if self.expected is not None and (paths := self._paths()) != self.expected:
            changed = dict(paths.items() ^ self.expected.items())
            raise Differ(f"nobody has changed {changed}: {sorted(paths)}")
        if stranded := self.engine.stranded():
            raise Stranded(f"{stranded}: {self._left()}")

    # -- steps ------------------------------------------------------------------------------------

    async def _step(self) -> None:
        local = [self._mkdir] * 3 + [self._write] * 5 + [self._remove] * 4 + [self._rename] * 4
        local += (
            [self._remove_tree] * 2 + [self._again] * 2 + [self._chmod, self._look, self._evict]
        )
        local += [self._hold, self._write_held, self._pod, self._remove_pod]
        other = [self._put] * 3 + [self._make] * 2 + [self._delete] * 3 + [self._move]
        other += [self._delete_tree, self._other_pod, self._hide]
        world = [self._wait] * 6 + [self._faults] * 3 + [self._sync]
        kind = self.dice.choices([local, other, world], [12, 0 if self.alone else 4, 4])[0]
        self.check()
        self.expected = None
        await self._try(self.dice.choice(kind))
        self.expected = self._paths() if self.alone else None
        self.check()
        if self.dice.random() < 0.5:
            await self._wait()

    async def _try(self, step: Step) -> None:
        said: object = "given up"
        try:
            with trio.move_on_after(60):
                said = await step()
        except (OSError, CpodfsError) as error:
            said = f"{type(error).__name__}: {error}"
        if said is not None:
            self.say(f"{step.__name__} {said}")

    def _pick(self, *, dirs: bool | None = None, top: bool = False) -> Inode | None:
        """Something that is there."""
        found: list[Inode] = []
        pending = [ROOT]
        while pending:
            parent = pending.pop()
            children = self.store.children(parent)
            pending += [c.ino for c in children if c.is_dir]
            found += [
                c
                for c in children
                if (dirs is None or c.is_dir == dirs) and (top or c.parent != ROOT)
            ]
        return self.dice.choice(found) if found else None

    def _place(self) -> tuple[int, str] | None:
        folder = self._pick(dirs=True, top=True)
        if folder is None or len(self.store.ancestors(folder.ino)) > 3:
            return None
        return folder.ino, self.dice.choice(NAMES)

    def _bytes(self) -> bytes:
        """Of another size each time, so that no two versions are alike."""
        self.written += 1
        return (b"%d." % self.written) * self.written

    def _path(self, ino: int, name: str = "") -> str:
        return "/".join(filter(None, [self.store.path(ino), name]))

    async def _mkdir(self) -> object:
        if (place := self._place()) is None:
            return None
        await self.tree.mkdir(*place, 0o755)
        return self._path(*place)

    async def _pod(self) -> object:
        name = self.dice.choice(PODS)
        await self.tree.mkdir(ROOT, name, 0o755)
        return name

    async def _remove_pod(self) -> object:
        pods = self.store.children(ROOT)
        if not pods:
            return None
        pod = self.dice.choice(pods)
        await self._empty(pod.ino)
        await self.tree.rmdir(ROOT, pod.name or "")
        return pod.name

    async def _write(self) -> object:
        if (place := self._place()) is None:
            return None
        inode = await self.tree.lookup(*place)
        if inode is None:
            inode, handle = await self.tree.create(*place, 0o644)
        else:
            emptied = self.dice.random() < 0.7
            files = self.tree.files
            handle = await files.open_emptied(inode.ino) if emptied else files.open(inode.ino)
        try:
            await self.tree.files.write(handle, 0, self._bytes())
            await self.tree.files.flush(handle)
        finally:
            self.tree.handles.release(handle)
        return f"{self._path(*place)} {self.written}"

    async def _remove(self) -> object:
        inode = self._pick()
        if inode is None or inode.parent is None:
            return None
        path = self._path(inode.ino)
        remove = self.tree.rmdir if inode.is_dir else self.tree.unlink
        await remove(inode.parent, inode.name or "")
        return path

    async def _remove_tree(self) -> object:
        inode = self._pick(dirs=True)
        if inode is None or inode.parent is None:
            return None
        path = self._path(inode.ino)
        self.say(f"removing {path}")
        await self._empty(inode.ino)
        await self.tree.rmdir(inode.parent, inode.name or "")
        return path

    async def _empty(self, ino: int) -> None:
        await self.tree.directory(ino)
        for child in self.store.children(ino):
            if child.is_dir:
                await self._empty(child.ino)
                await self.tree.rmdir(ino, child.name or "")
            else:
                await self.tree.unlink(ino, child.name or "")

    async def _again(self) -> object:
        """Directories are removed and made again, under the same names."""
        folder = self._pick(dirs=True, top=True)
        if folder is None:
            return None
        children = [c for c in self.store.children(folder.ino) if c.is_dir]
        for child in children:
            await self._empty(child.ino)
            await self.tree.rmdir(folder.ino, child.name or "")
            if self.dice.random() < 0.3:
                await self._wait()
            await self.tree.mkdir(folder.ino, child.name or "", 0o755)
        return f"{self._path(folder.ino)}: {[c.name for c in children]}"

    async def _rename(self) -> object:
        inode, place = self._pick(), self._place()
        if inode is None or inode.parent is None or place is None:
            return None
        old = self._path(inode.ino)
        flags = RENAME_EXCHANGE if self.dice.random() < 0.15 else 0
        await self.tree.rename(inode.parent, inode.name or "", *place, flags)
        return f"{old} {self._path(*place)} {flags}"

    async def _chmod(self) -> object:
        inode = self._pick()
        if inode is None:
            return None
        mode = self.dice.choice([0o700, 0o600, 0o500])
        await self.tree.set_attributes(inode.ino, Times(mode=mode), None)
        return f"{self._path(inode.ino)} {mode:o}"

    async def _look(self) -> object:
        folder = self._pick(dirs=True, top=True)
        ino = ROOT if folder is None or self.dice.random() < 0.2 else folder.ino
        if self.dice.random() < 0.5:
            await self.parts.lister.refresh_from_others(ino)
        else:
            await self.tree.opendir(ino)
        return self._path(ino)

    async def _evict(self) -> object:
        for inode in [self._pick(dirs=False) for _ in range(3)]:
            clean = inode is not None and not inode.dirty and inode.cached
            if inode is not None and clean and self.tree.handles.opened(inode.ino) is None:
                self.parts._evictor._evict(inode.ino)
        return None

    async def _hold(self) -> object:
        inode = self._pick(dirs=False)
        if inode is None:
            return None
        self.handles.append(self.tree.files.open(inode.ino))
        return self._path(inode.ino)

    async def _write_held(self) -> object:
        if not self.handles:
            return None
        handle = self.handles.pop(self.dice.randrange(len(self.handles)))
        ino = self.tree.handles.file(handle).ino
        try:
            await self.tree.files.write(handle, 0, self._bytes())
        finally:
            self.tree.handles.release(handle)
        return self._path(ino) if self.store.get(ino) is not None else ino

    # -- what the other session does --------------------------------------------------------------

    def _theirs(self, *, dirs: bool) -> tuple[str, str] | None:
        found = self.server.contents(self.user)
        paths = sorted(p for p, data in found.items() if "/" in p and (data is None) == dirs)
        if not paths:
            return None
        pod, _, path = self.dice.choice(paths).partition("/")
        return pod, f"/{path}"

    def _their_folder(self) -> tuple[str, str] | None:
        folder = self._theirs(dirs=True)
        pods = sorted(self.server.trees(self.user))
        if folder is None or self.dice.random() < 0.5:
            return (self.dice.choice(pods), "/") if pods else None
        return folder

    async def _put(self) -> object:
        if (folder := self._their_folder()) is None:
            return None
        name = self.dice.choice(NAMES)
        await self._put_as(*folder, name)
        return f"{folder} {name} {self.written}"

    async def _put_as(self, pod: str, folder: str, name: str) -> None:
        data = self._bytes()

        async def body() -> AsyncIterator[bytes]:
            yield data

        await self.other.upload(pod, folder, name, body, len(data))

    async def _make(self) -> object:
        if (folder := self._their_folder()) is None:
            return None
        path = f"{folder[1].rstrip('/')}/{self.dice.choice(NAMES)}"
        if self.server.trees(self.user)[folder[0]].file(path) is not None:
            return None  # the real server ends the connection
        await self.other.mkdir(folder[0], path)
        return f"{folder[0]}{path}"

    async def _delete(self) -> object:
        if (file := self._theirs(dirs=False)) is None:
            return None
        await self.other.delete_file(*file)
        return file

    async def _delete_tree(self) -> object:
        if (folder := self._theirs(dirs=True)) is None:
            return None
        if folder[1].count("/") > 1:
            return None  # the server's own way edits the wrong list
        pod, path = folder
        found = [p for p, data in self.server.contents(self.user).items() if data is None]
        below = {p.rpartition("/")[2] for p in found if p.startswith(f"{pod}{path}/")}
        if any(f"{pod}/{name}" in found for name in below):
            return None  # for the directories in it, too
        await self.other.raw_rmdir(pod, path)
        return folder

    async def _move(self) -> object:
        file, folder = self._theirs(dirs=False), self._their_folder()
        if file is None or folder is None or file[0] != folder[0]:
            return None
        new = f"{folder[1].rstrip('/')}/{self.dice.choice(NAMES)}"
        tree = self.server.trees(self.user)[folder[0]]
        if any(("D", new.rpartition("/")[2]) == entry for entry in tree.entries(folder[1])):
            return None
        await self.other.rename_file(*file, new)
        return f"{file} {new}"

    async def _other_pod(self) -> object:
        name = self.dice.choice(PODS)
        if name in self.server.trees(self.user):
            if self.dice.random() < 0.5:
                return None
            await self.other.delete_pod(name)
            if self.dice.random() < 0.5:
                return f"deleted {name}"
        await self.other.create_pod(name)
        return name

    async def _hide(self) -> object:
        """Something that a mount cannot show."""
        pods = sorted(self.server.trees(self.user))
        if not pods:
            return None
        pod = self.dice.choice(pods)

        async def body() -> AsyncIterator[bytes]:
            yield HIDDEN

        await self.other.upload(pod, "/", ".run", body, len(HIDDEN))
        return pod

    # -- the world --------------------------------------------------------------------------------

    async def _wait(self) -> object:
        for _ in range(self.dice.choice([1, 1, 3, 10])):
            await trio.sleep(self.dice.choice([0.0, 0.01, 0.1, 0.5, 2.0, 10.0]))
            self.check()
        return None

    async def _sync(self) -> object:
        with trio.move_on_after(60):
            await drain(self.engine, 30.0)
        return "done"

    async def _faults(self) -> object:
        fate, shares = self.fate, [0.0, 0.0, 0.1, 0.4]
        fate.refused, fate.broken, fate.lost = (self.dice.choice(shares) for _ in range(3))
        fate.refused /= 2
        fate.away = self.dice.random() < 0.15
        return f"{fate.refused} {fate.broken} {fate.lost} {fate.away}"


def _too_long(_number: int, _frame: object) -> None:
    raise Endless(f"not over after {LONGEST_S} s")


def play(seed: int, scratch: Path) -> str | None:
    """One history; what went wrong with it, or None."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    server = Simulated(folder / "server")
    history = History(server, folder, seed)
    random.seed(seed)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST_S)
    try:
        with virtual_time() as clock:
            trio.run(history.run, clock=clock)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        steps = "\n".join(history.log)
        return f"seed {seed}:\n{steps}\n{''.join(traceback.format_exception(error))}"
    finally:
        signal.alarm(0)
        server.server.store.close()
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _play(job: tuple[int, str, bool]) -> str | None:
    seed, scratch, verbose = job
    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s %(message)s")
    else:
        logging.disable(logging.CRITICAL)
    return play(seed, Path(scratch))


@click.command()
@click.option("--count", default=10_000, show_default=True, help="How many histories.")
@click.option("--seed", default=0, show_default=True, help="The first one's.")
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Processes at once.")
@click.option("--verbose", is_flag=True, help="One history, with the driver's log.")
def main(count: int, seed: int, jobs: int, verbose: bool) -> None:
    """Play random histories; print those that went wrong."""
    started, failed = time.monotonic(), 0
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="histories-", dir=shared) as scratch:
        os.environ["PYTHONHASHSEED"] = "0"  # the same seed, the same history
        count, jobs = (1, 1) if verbose else (count, jobs)
        with get_context("spawn").Pool(jobs) as pool:
            work = ((number, scratch, verbose) for number in range(seed, seed + count))
            for trouble in pool.imap_unordered(_play, work, chunksize=8):
                if trouble is not None:
                    failed += 1
                    click.echo(f"{trouble}\n{'-' * 80}")
    click.echo(f"{count} histories, {failed} went wrong, {time.monotonic() - started:.0f} s")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
