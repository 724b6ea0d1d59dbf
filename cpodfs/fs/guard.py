"""Which pods may be run, and how: the user's own, and those whose code he has vouched for.

Imports the tree, recipes and `runs.trust`. Runs in the driver, which must not use its own mount: it
reads through the tree. What it reads was written by strangers, so all of it is bounded.
"""

from __future__ import annotations

import logging
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
                    f"{what.name}: its recipe or script has changed since it was trusted; look "
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
        """What trust in a pod is bound to: its recipe, its script folder, and the program that
        ``exec`` names where that is elsewhere in the pod. Raises NotTrusted if it is too much."""
        sheet = _Sheet(self._tree, what.name)
        await sheet.add("recipe", what.recipe.file, what.raw)
        script = what.recipe.script.split("/")
        inode = await self._find(what.pod, script)
        if inode is not None:
            await sheet.walk(inode, what.recipe.script, len(script))
        for word in _programs(what.recipe.exec_argv):
            parts = [part for part in word.split("/") if part not in ("", ".")]
            if word.startswith("/") or ".." in parts or parts[: len(script)] == script:
                continue
            program = await self._find(what.pod, parts)
            if program is not None and not program.is_dir:
                await sheet.walk(program, "/".join(parts), 0)
        return sheet.print

    async def _find(self, pod: Inode, parts: list[str]) -> Inode | None:
        inode: Inode | None = pod
        for part in parts:
            if inode is None or not inode.is_dir:
                return None
            inode = await self._tree.lookup(inode.ino, part)
        return None if inode is pod else inode


def _programs(argv: tuple[str, ...]) -> list[str]:
    """The words that may name the program: the first, and what it is to interpret."""
    interpreted = next((word for word in argv[1:] if not word.startswith("-")), None)
    return [argv[0]] if interpreted is None else [argv[0], interpreted]


class _Sheet:
    """A fingerprint in the making, within its limits."""

    def __init__(self, tree: Tree, pod: str) -> None:
        self.print = Fingerprint()
        self._tree = tree
        self._pod = pod
        self._left = CODE_LIMIT_BYTES

    async def walk(self, inode: Inode, path: str, depth: int) -> None:
        if depth > DEPTH_LIMIT:
            raise self._too_much()
        if inode.is_dir:
            await self.add("folder", path, b"")
            await self._tree.directory(inode.ino)
            for child in sorted(self._tree.store.children(inode.ino), key=lambda c: c.name or ""):
                await self.walk(child, f"{path}/{child.name}", depth + 1)
        elif inode.kind == LINK:
            target = (inode.target or "").encode("utf-8", "surrogateescape")
            await self.add("link", path, target)
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
            f"{CODE_LIMIT_BYTES >> 20} MiB or {DEPTH_LIMIT} levels in its script folder"
        )
