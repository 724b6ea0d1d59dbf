"""Which pods may be run, and how: the user's own, and those whose code he has vouched for.

Imports the tree, recipes and `runs.trust`. Runs in the driver, which must not use its own mount: it
reads through the tree. What it reads was written by strangers, so all of it is bounded.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import trio

from cpodfs.cache.schema import LINK
from cpodfs.cache.store import Inode
from cpodfs.errors import NotTrusted
from cpodfs.fs.tree import Tree
from cpodfs.recipe import Recipe
from cpodfs.runs import sandbox
from cpodfs.runs.trust import Fingerprint, TrustBook

log = logging.getLogger(__name__)

CODE_LIMIT_BYTES = 64 << 20
CODE_LIMIT_FILES = 5000
DEPTH_LIMIT = 64
_IN_A_THREAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PodRecipe:
    """A pod's recipe as it stands there: ``raw`` is the bytes of the file."""

    pod: Inode
    recipe: Recipe
    raw: bytes

    @property
    def name(self) -> str:
        return self.pod.name or ""


class Guard:
    """``mode``: one of ``sandbox.MODES``."""

    def __init__(self, tree: Tree, book: TrustBook, mode: str) -> None:
        self.book = book
        self._tree = tree
        self._mode = mode
        self._probed: tuple[str | None, str | None] | None = None
        self._probing = trio.Lock()

    async def admit(self, what: PodRecipe) -> str | None:
        """Raise NotTrusted unless the pod may be run; returns the path of bwrap for a sandbox."""
        own = self.book.is_own(what.name)
        if not own:
            trusted = self.book.trusted(what.name)
            if trusted is None:
                raise NotTrusted(
                    f"{what.name}: not known to be your own, so its code is a stranger's; look at "
                    f"it and say yes: cpodfs trust {what.name}"
                )
            if (await self.fingerprint(what)).hexdigest() != trusted:
                raise NotTrusted(
                    f"{what.name}: its code has changed since it was trusted; look "
                    f"again: cpodfs trust {what.name}"
                )
        return await self._sandbox(what, own=own)

    async def _sandbox(self, what: PodRecipe, *, own: bool) -> str | None:
        # With a runtime the pod's code runs at providers; what runs here is ours.
        if self._mode == "off" or (self._mode == "auto" and own) or what.recipe.runtime is not None:
            return None
        async with self._probing:
            if self._probed is None:
                program = sandbox.program()
                self._probed = program, await trio.to_thread.run_sync(sandbox.broken, program)
        program, reason = self._probed
        if reason is None:
            return program
        if self._mode == "on":
            raise NotTrusted(f"{what.name}: --sandbox on: {reason}")
        log.warning("no sandbox pod=%r: %s", what.name, reason)
        return None

    async def fingerprint(self, what: PodRecipe) -> Fingerprint:
        """What trust in a pod is bound to: all that is in it but the folders for payload, output
        and logs, and those too that ``exec`` speaks of. Raises NotTrusted if it is too much, or
        has a link, behind which there can be another thing at any time."""
        sheet = _Sheet(self._tree, what.name, _not_code(what.recipe))
        await sheet.add("recipe", what.recipe.file, what.raw)
        await sheet.folder(what.pod, "", 0)
        # It counts even inside a folder that does not.
        await sheet.script(what.pod, what.recipe.script)
        return sheet.print


def _not_code(recipe: Recipe) -> frozenset[str]:
    """The folders on which trust does not depend. A word of exec may name one as a path, a module
    (``payload.main``) or in a line for a shell: whatever speaks of it makes it code."""
    folders = {recipe.payload, recipe.output, recipe.log} - {recipe.script}
    return frozenset(
        folder
        for folder in folders
        if not any(_speaks_of(word, folder) for word in recipe.exec_argv)
    )


def _speaks_of(word: str, folder: str) -> bool:
    # The last name is enough: the program may be told to start from the folder above it.
    name = re.escape(folder.rpartition("/")[2])
    return re.search(rf"(?<!\w){name}(?!\w)", word) is not None


class _Sheet:
    """A fingerprint in the making, within its limits."""

    def __init__(self, tree: Tree, pod: str, not_code: frozenset[str]) -> None:
        self.print = Fingerprint()
        self._tree = tree
        self._pod = pod
        self._not_code = not_code
        self._seen: set[int] = set()
        self._left = CODE_LIMIT_BYTES

    async def folder(self, inode: Inode, path: str, depth: int) -> None:
        """All that is in a folder; ``path``: relative to the pod, with a slash at its end."""
        await self._tree.directory(inode.ino)
        for child in sorted(self._tree.store.children(inode.ino), key=lambda c: c.name or ""):
            below = f"{path}{child.name}"
            if not (child.is_dir and below in self._not_code):
                await self.walk(child, below, depth + 1)

    async def script(self, pod: Inode, path: str) -> None:
        """The script folder, if `folder` passed it over."""
        inode = pod
        for part in path.split("/"):
            found = await self._tree.lookup(inode.ino, part)
            if found is None:
                return
            inode = found
            if not inode.is_dir:
                break
        if inode.ino not in self._seen:
            await self.walk(inode, path, path.count("/") + 1)

    async def walk(self, inode: Inode, path: str, depth: int) -> None:
        if depth > DEPTH_LIMIT:
            raise self._too_much()
        self._seen.add(inode.ino)
        if inode.is_dir:
            await self.add("folder", path, b"")
            await self.folder(inode, f"{path}/", depth)
        elif inode.kind == LINK:
            raise NotTrusted(
                f"{self._pod}: {path!a} is a link, and what is behind it cannot be vouched for; "
                f"put a file there, or say that the pod is your own: cpodfs trust --own {self._pod}"
            )
        else:
            if self._tree.files.size(inode) > self._left:
                raise self._too_much()
            content = await self._tree.files.read_whole(inode.ino, self._left + 1)
            await self.add("file", path, content, executable=bool(inode.mode & 0o111))

    async def add(self, kind: str, path: str, content: bytes, *, executable: bool = False) -> None:
        self._left -= len(content)
        if self._left < 0 or len(self.print.files) >= CODE_LIMIT_FILES:
            raise self._too_much()
        if len(content) < _IN_A_THREAD_BYTES:
            self.print.add(kind, path, content, executable=executable)
        else:
            await trio.to_thread.run_sync(
                lambda: self.print.add(kind, path, content, executable=executable)
            )

    def _too_much(self) -> NotTrusted:
        return NotTrusted(
            f"{self._pod}: too much code to vouch for: more than {CODE_LIMIT_FILES} files, "
            f"{CODE_LIMIT_BYTES >> 20} MiB or {DEPTH_LIMIT} levels outside of "
            "its payload, output and log folders, or in one that golem.exec speaks of"
        )
