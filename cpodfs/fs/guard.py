"""Which pods may be run, and how: the user's own, and those whose code he has vouched for.

Imports the tree, recipes and `runs.trust`. Runs in the driver, which must not use its own mount: it
reads through the tree. What it reads was written by strangers, so all of it is bounded.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import trio

from cpodfs import words
from cpodfs.cache.schema import LINK
from cpodfs.cache.store import Inode
from cpodfs.errors import NotNow, NotTrusted, RunError
from cpodfs.fs.provenance import Provenance
from cpodfs.fs.tree import Tree
from cpodfs.recipe import Recipe, is_recipe_name
from cpodfs.runs import sandbox
from cpodfs.runs.trust import Fingerprint, TrustBook, Vouched
from cpodfs.sync.holds import Extent, Holds

log = logging.getLogger(__name__)

CODE_LIMIT_BYTES = 64 << 20
CODE_LIMIT_FILES = 5000
DEPTH_LIMIT = 64
SETTLE_S = 30.0
_IN_A_THREAD_BYTES = 1 << 20
_SHELL = re.compile(r"(ba|da|a|z|k|mk|c|tc|fi)?sh|busybox")
_INTERPRETERS = {
    r"(python|pypy)[\d.]*": "-[uBsEOq]+",
    _SHELL.pattern: "-[euxv]+",
    "node|perl|ruby|Rscript|julia|lua|php": "",
}
"""With the flags that may stand before the program's file."""
_FOLDER = re.compile(r"\$(?:CPODFS_(SCRIPT|PAYLOAD|OUTPUT)\b|\{CPODFS_(SCRIPT|PAYLOAD|OUTPUT)\})")
_PROGRAM = re.compile(
    r"\.(py[cdwz]?|pth|so(\.\d+)*|(ba|z|k|c)?sh|fish|pl|pm|rb|[cm]?[jt]s|lua|php|r|jl|tcl|jar|class|wasm|"
    r"awk|sed|mk)$|(^|/)makefile$",
    re.IGNORECASE,
)
"""The names of what some program takes for code without being told of it by name."""
_PROGRAM_TEXT = re.compile(r"CPODFS_|[$`*?()\[\];&|<>\\'\"\n]")
"""What makes of a word something that can find a folder without naming it."""


@dataclass(frozen=True, slots=True)
class PodRecipe:
    """A pod's recipe as it stands there: ``raw`` is the bytes of the file."""

    pod: Inode
    recipe: Recipe
    raw: bytes

    @property
    def name(self) -> str:
        return self.pod.name or ""


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a pod would be run now, and why so. ``kind``: "provider" (there), "market" (here, in a
    sandbox of the local market), "sandbox", "bare" (here, without one), "refused". ``bwrap``: its path, for a sandbox; ``error``: what a refusal raises."""

    kind: str
    why: str = ""
    bwrap: str | None = None
    error: type[RunError] = NotTrusted
    by_choice: bool = True


class Guard:
    """``mode``: one of ``sandbox.MODES``. ``local_market``: whether the providers are processes of this
    machine. ``unconfined``: why those are in no sandbox, if so; nobody is who may speak to them."""

    def __init__(
        self,
        tree: Tree,
        book: TrustBook,
        holds: Holds,
        provenance: Provenance,
        mode: str,
        *,
        local_market: bool,
        unconfined: str | None,
    ) -> None:
        self.book = book
        self._tree = tree
        self._holds = holds
        self._provenance = provenance
        self._admitted: dict[str, PodRecipe] = {}
        self._mode = mode
        self._local_market = local_market
        self._unconfined = unconfined
        self._works: str | None = None
        self._probing = trio.Lock()

    async def admit(self, what: PodRecipe) -> str | None:
        """Raise NotTrusted unless the pod may be run; returns the path of bwrap for a sandbox. What
        was looked at is held from then on; who starts no run after that says so (`let_go`)."""
        own = self.book.is_own(what.name)
        if not own:
            trusted = self.book.trusted(what.name)
            if trusted is None:
                raise NotTrusted(
                    f"{what.name}: not known to be your own, so its code is a stranger's; look at "
                    f"it and say yes: cpodfs trust {what.name}"
                )
            self._holds.begin(what.name, _extent(what.recipe))
            self._provenance.begin(what.name)
            changed = await self.changed(what, await self.fingerprint(what))
            if changed is not None:
                named = f": {words.some(changed)}" if changed else ""
                raise NotTrusted(
                    f"{what.name}: its code has changed since it was trusted{named}; look "
                    f"again: cpodfs trust {what.name}"
                )
        how = await self.outlook(what, own=own)
        if how.kind == "refused":
            raise how.error(f"{what.name}: {how.why}")
        if how.kind == "bare" and not how.by_choice:
            if not own and self.is_boxed(what):
                raise NotTrusted(
                    f"{what.name}: was trusted to run in a sandbox, and there is none: {how.why}; "
                    f"look again: cpodfs trust {what.name}"
                )
            log.warning("no sandbox pod=%r: %s", what.name, how.why)
        if not own:
            self._holds.seal(what.name)
            self._admitted[what.name] = what
        return how.bwrap

    def is_running(self, pod: str) -> bool:
        """Whether a run of an earlier driver may go on, which has not been found yet."""
        return self._holds.is_sealed(pod)

    def let_go(self, pod: str) -> None:
        """No run of the pod has begun."""
        self._admitted.pop(pod, None)
        self._provenance.end(pod)
        self._holds.end(pod)

    async def changed(self, what: PodRecipe, sheet: Fingerprint) -> list[str] | None:
        """What is not as it was when the pod was trusted, by name; None if it is trusted as it is. The
        names of earlier versions' records are not known."""
        vouched = await trio.to_thread.run_sync(self.book.vouched, what.name)
        if vouched is None:
            if sheet.hexdigest() != self.book.trusted(what.name):
                return []
            await self.vouch(what.name, sheet)
            return None
        found = vouched.changed(sheet.entries)
        return list(dict.fromkeys(path or what.recipe.file for path in found)) or None

    async def vouch(self, pod: str, sheet: Fingerprint) -> None:
        """Keep what is behind a hash that is, or is about to be, trusted."""
        vouched = Vouched(sheet.hexdigest(), sheet.entries)
        await trio.to_thread.run_sync(self.book.note, pod, vouched)

    async def settle(self, pod: str) -> None:
        """A run is over, and nothing of it is left that could change anything. What it has changed
        itself, it and nobody else, does not end the trust in it, except for what it `starts_from`."""
        what = self._admitted.pop(pod, None)
        try:
            if what is not None and self._provenance.wrote(pod):
                with trio.move_on_after(SETTLE_S):  # meanwhile the run is not over for its user
                    await self._note_doings(what)
        except (NotTrusted, OSError) as error:
            log.warning("what the run changed is not noted pod=%r: %s", pod, error)
        finally:
            self._provenance.end(pod)

    async def _note_doings(self, what: PodRecipe) -> None:
        vouched = await trio.to_thread.run_sync(self.book.vouched, what.name)
        if vouched is None:
            return
        entries = (await self.fingerprint(what)).entries
        own = {
            path
            for path in vouched.changed(entries)
            if not starts_from(what.recipe, path, vouched.files, entries)
            and self._provenance.is_own_doing(what.name, what.pod.ino, path)
        }
        after = vouched.with_made(entries, own)
        if after != vouched:
            await trio.to_thread.run_sync(self.book.note, what.name, after)

    async def outlook(self, what: PodRecipe, *, own: bool) -> Outlook:
        """How it would be run, were it trusted."""
        if what.recipe.runtime is not None and self._unconfined is None:  # what runs here is ours
            return Outlook("market" if self._local_market else "provider")
        if self._mode == "off":
            return Outlook("bare", "--sandbox off")
        if self._mode == "auto" and own:
            return Outlook("bare", "it is your own")
        try:
            reason = await self._missing()
        except NotNow as error:
            # To run it bare for that would be to let it choose: it can keep the machine busy.
            return Outlook("refused", str(error), error=NotNow)
        if reason is None:
            return Outlook("sandbox", bwrap=self._works)
        if self._mode == "on":
            return Outlook("refused", f"--sandbox on: {reason}")
        return Outlook("bare", reason, by_choice=False)

    def is_boxed(self, what: PodRecipe) -> bool:
        """Whether it was trusted to run in a sandbox or at providers, and not here without one."""
        return self.book.is_boxed(what.name, hires=what.recipe.runtime is not None)

    async def _missing(self) -> str | None:
        """Why there is no sandbox here. What works is not asked again, what fails is."""
        if self._unconfined is not None:
            return f"the local market has none for its programs: {self._unconfined}"
        async with self._probing:
            if self._works is None:
                program = sandbox.program()
                reason = await trio.to_thread.run_sync(sandbox.never_works, program)
                if reason is not None:
                    return reason
                self._works = program
        return None

    async def fingerprint(self, what: PodRecipe) -> Fingerprint:
        """What trust in a pod is bound to: all that is in it but the folders for payload, output
        and logs, and those too that ``exec`` speaks of. Raises NotTrusted if it is too much, or
        has a link, behind which there can be another thing at any time."""
        recipe = what.recipe
        left_out = not_code(recipe)
        sheet = _Sheet(self._tree, what.name, frozenset(left_out))
        await sheet.add("recipe", recipe.file, what.raw)
        await sheet.folder(what.pod, "", 0)
        # They count even inside a folder that does not.
        for folder in dict.fromkeys((recipe.script, recipe.payload)):
            if folder not in left_out:
                await sheet.inside(what.pod, folder)
        return sheet.print


def not_code(recipe: Recipe) -> tuple[str, ...]:
    """The folders on which trust does not depend; what of them is in the script folder counts all the
    same. If ``exec`` starts a file of the script folder, what else it speaks of is data. Of any other
    command the payload counts, for it may find code there without naming it (``pytest``), and those
    for output and logs if it speaks of them; else not, for each run would end the trust.
    """
    folders: tuple[str, ...] = (recipe.output, recipe.log)
    if _starts_script(recipe):
        folders = (recipe.payload, *folders)
    else:
        folders = tuple(
            folder
            for folder in folders
            if not any(_speaks_of(word, folder) for word in recipe.exec_argv)
        )
    inside = f"{recipe.script}/"
    return tuple(f for f in dict.fromkeys(folders) if not f"{f}/".startswith(inside))


def starts_from(
    recipe: Recipe, path: str, vouched: Mapping[str, str], now: Mapping[str, str]
) -> bool:
    """Whether a path is of what a run starts from, which even its own program does not change without
    being looked at again: what stays in it of a stranger's result would be started the next time.
    ``vouched``, ``now``: what was looked at and what is there, as `Fingerprint.entries`."""
    if not path or ("/" not in path and is_recipe_name(path)):
        return True
    # At a provider that is all that is sent there, for results come from there.
    sent = (recipe.script,) if recipe.runtime is None else (recipe.script, recipe.payload)
    if any(_is_in(path, folder) for folder in sent):
        return True
    entries = vouched.get(path, ""), now.get(path, "")
    if any(
        e.startswith("file 1 ") or (e.startswith("file") and _PROGRAM.search(path)) for e in entries
    ):
        return True
    return path in vouched and any(_is_in(path, name) for name in _places_of_code(recipe))


def _places_of_code(recipe: Recipe) -> Iterator[str]:
    """What the command may mean as a file, a folder or a module."""
    folders = {"SCRIPT": recipe.script, "PAYLOAD": recipe.payload, "OUTPUT": recipe.output}
    for word in recipe.exec_argv:
        plain = _FOLDER.sub(lambda found: folders[found[1] or found[2]], word)
        yield from named([plain])
        if module := posixpath.dirname(plain.replace(".", "/")):
            yield module


def named(argv: Iterable[str]) -> list[str]:
    """The paths that a command may name: as they are, in a line for a shell, or as modules."""
    found = []
    for word in argv:
        for name in (word, *re.findall(r"[\w./+-]+", word)):
            path = posixpath.normpath(name)
            module = name.replace(".", "/")
            found += [path, f"{path}/__main__.py", f"{module}.py", f"{module}/__main__.py"]
    return found


def _is_in(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _extent(recipe: Recipe) -> Extent:
    """The folders of a pod whose contents `Guard.fingerprint` looks at."""
    without = not_code(recipe)
    within = tuple(folder for folder in (recipe.script, recipe.payload) if folder not in without)
    return Extent(without, within)


def _starts_script(recipe: Recipe) -> bool:
    """Whether exec does nothing but start a file of the script folder, itself or by an interpreter."""
    program, *rest = recipe.exec_argv
    if _can_lead_anywhere(recipe.exec_argv):
        return False
    for interpreter, flag in _INTERPRETERS.items():
        if re.fullmatch(interpreter, posixpath.basename(program)):
            # Not any option: the word after it may belong to it.
            program = next((word for word in rest if not re.fullmatch(flag, word)), "")
            break
    return posixpath.normpath(program).startswith(f"{recipe.script}/")


def _can_lead_anywhere(argv: tuple[str, ...]) -> bool:
    if any(_PROGRAM_TEXT.search(word) for word in argv):
        return True
    if any(w[:1] == "/" or posixpath.normpath(w).split("/")[0] in (".", "..") for w in argv[1:]):
        return True  # the pod as a whole, or what is above it
    shell = any(
        _SHELL.fullmatch(posixpath.basename(word)) for part in argv for word in part.split()
    )
    return shell and any(re.search(r"(^|\s)-\w*c", word) for word in argv)


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

    async def inside(self, pod: Inode, path: str) -> None:
        """A folder that counts, if `folder` passed it over."""
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
