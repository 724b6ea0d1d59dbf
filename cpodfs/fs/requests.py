"""Questions and orders of the commands, each with an answer: ``user.cpodfs.request.<id>``.

Imports the tree, the DFS client and the control files. A request is JSON, set as an attribute of the
mount's root, and its answer is read once from the same attribute. The root, because a program in a
sandbox sees its pod's folder only: it cannot vouch for itself. Answers may be secret.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from cpodfs import paths, words
from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Inode
from cpodfs.dfs import Client
from cpodfs.errors import AlreadyExists, ConfigError, CpodfsError, NotFound, NotTrusted, Refused
from cpodfs.fs.control import RunFiles, advice
from cpodfs.fs.guard import Guard, named, not_code
from cpodfs.fs.pods import check_writable
from cpodfs.fs.tree import Tree
from cpodfs.recipe import Recipe
from cpodfs.sync.ops import check_pods_shown

log = logging.getLogger(__name__)

ANSWERS_KEPT = 64
ANSWER_LIMIT_BYTES = 60_000
"""An attribute's value has 64 KiB at most."""
FILES_SHOWN = 100
FILES_SHOWN_BYTES = 40_000
_REFERENCE = re.compile("([0-9a-fA-F]{2})+")
RECORD_KEYS = ("state", "exit_code", "signal", "error", "started", "ended", "log", "warnings")

Answer = dict[str, Any]


def _encoded(answer: Answer) -> bytes:
    encoded = json.dumps(answer).encode()
    if len(encoded) > ANSWER_LIMIT_BYTES:
        return json.dumps({"error": "the answer is too long"}).encode()
    return encoded


class Requests:
    """``refresh``: look at the server's list of pods, now. ``forgotten``: told the remote id of a pod
    that the server surely has no more."""

    def __init__(
        self,
        tree: Tree,
        runs: RunFiles,
        guard: Guard,
        dfs: Client,
        refresh: Callable[[], Awaitable[None]],
        *,
        forgotten: Callable[[int], None],
    ) -> None:
        self._tree = tree
        self._runs = runs
        self._guard = guard
        self._dfs = dfs
        self._refresh = refresh
        self._forgotten = forgotten
        self._answers: dict[bytes, bytes] = {}
        self._known: dict[str, Callable[..., Awaitable[Answer]]] = {
            "trust": self._trust,
            "confirm": self._confirm,
            "own": self._own,
            "revoke": self._revoke,
            "run": self._run,
            "record": self._record,
            "fork": self._fork,
            "share": self._share,
            "receive": self._receive,
            "forget": self._forget,
        }

    async def ask(self, key: bytes, value: bytes) -> None:
        """Carry out a request; what becomes of it is in the answer, never raised.

        No request at all: the answer was read, and can be forgotten.
        """
        if not value:
            self._answers.pop(key, None)
            return
        try:
            fields = json.loads(value)
            handler = self._known[fields.pop("ask")]
            answer = await handler(**fields)
        except CpodfsError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"{error.filename or 'failed'}: {error.strerror}{advice(error)}"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.info("request not understood", exc_info=True)
            answer = {"error": "not understood; is the mount's driver of another version?"}
        self._answers[key] = _encoded(answer)
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.pop(next(iter(self._answers)))

    def answer(self, key: bytes) -> bytes | None:
        """What became of a request; None when it was none, or was long ago."""
        return self._answers.get(key)

    # -- runs and trust ---------------------------------------------------------------------------

    async def _run(self, pod: str, changes: dict[str, str]) -> Answer:
        run, log_folder = await self._runs.start((await self._pod(pod)).ino, changes)
        return {"run": run, "log": log_folder}

    async def _record(self, pod: str, run: str) -> Answer:
        record = self._runs.record(pod, run) or {}
        return {"record": {key: record.get(key) for key in RECORD_KEYS}}

    async def _trust(self, pod: str, own: bool = False) -> Answer:
        what = await self._runs.recipe((await self._pod(pod)).ino)
        sheet = await self._guard.fingerprint(what)
        book = self._guard.book
        how = await self._guard.outlook(what, own=own or book.is_own(pod))
        # What was trusted to run in a sandbox is not trusted to run without.
        lapsed = self._guard.is_boxed(what) and how.kind == "bare" and not how.by_choice
        known = book.trusted(pod) is not None and not lapsed
        changed = await self._guard.changed(what, sheet) if known else None
        return {
            "own": book.is_own(pod),
            "trusted": changed is None if known else None,
            "changed": words.some(changed or ()),
            "how": how.kind,
            "why": how.why,
            "hash": sheet.hexdigest(),
            "recipe": what.recipe.file,
            "recipe_sha256": hashlib.sha256(what.raw).hexdigest(),
            "files": _shown(what.recipe, sheet.files[1:]),
            "count": len(sheet.files) - 1,
            "left_out": not_code(what.recipe),
        }

    async def _confirm(self, pod: str, digest: str) -> Answer:
        what = await self._runs.recipe((await self._pod(pod)).ino)
        sheet = await self._guard.fingerprint(what)
        if sheet.hexdigest() != digest:
            raise NotTrusted(f"{pod}: changed while you looked; look again")
        how = await self._guard.outlook(what, own=False)
        await self._guard.vouch(pod, sheet)
        self._guard.book.trust(pod, digest, boxed=how.kind != "bare")
        log.info("pod trusted pod=%r hash=%s", pod, digest)
        return {}

    async def _own(self, pod: str) -> Answer:
        check_writable(self._tree.store, (await self._pod(pod)).ino)
        self._guard.book.own(pod)
        log.info("pod is the user's own, he says pod=%r", pod)
        return {}

    async def _revoke(self, pod: str) -> Answer:
        return {"known": self._guard.book.forget(pod)}

    # -- pods of others ---------------------------------------------------------------------------

    async def _fork(self, pod: str, new: str) -> Answer:
        await self._pod(pod)
        await self._check_free(new)
        await check_pods_shown(self._tree.store, self._dfs)
        await self._dfs.fork_pod(pod, new)
        await self._refresh()
        await self._pod(new)
        # Only now: the server's pod of this name, which was copied, may be none of ours.
        own = self._guard.book.is_own(pod)
        if own:
            self._guard.book.own(new)
        return {"pod": new, "own": own}

    async def _share(self, pod: str) -> Answer:
        await self._pod(pod)
        return {"reference": await self._dfs.share_pod(pod)}

    async def _receive(self, reference: str, new: str | None) -> Answer:
        if new is not None:
            await self._check_free(new)
        if not _REFERENCE.fullmatch(reference):
            raise ConfigError("not a reference to a pod; it is what `cpodfs share` prints")
        # First of all, because a fork of nothing is no error to the server.
        try:
            name = (await self._dfs.receive_info(reference)).pod
        except (NotFound, Refused) as error:
            raise NotFound("the server finds no pod at this reference") from error
        if new is None:
            if await self._dfs.pod_present(name):
                raise AlreadyExists(
                    f"{name}: you have a pod of that name, your own or received; for a copy under "
                    "another name: cpodfs receive --fork NEW"
                )
            await check_pods_shown(self._tree.store, self._dfs)
            await self._dfs.receive_pod(reference)
        else:
            await check_pods_shown(self._tree.store, self._dfs)
            await self._dfs.fork_from_reference(new, reference)
        await self._refresh()
        await self._pod(new or name)
        return {"pod": new or name}

    async def _forget(self, pod: str) -> Answer:
        """Take a pod out of those received; its owner's is not touched."""
        found = await self._dfs.pods()
        if pod in found.own or pod not in found.shared:
            raise NotFound(
                f"{pod}: was not received, so it cannot be forgotten; for your own: rmdir"
            )
        await self._dfs.delete_pod(pod)
        known = self._tree.store.remote_at(ROOT, pod)
        if known is not None:
            self._forgotten(known.rid)
        await self._refresh()
        return {}

    async def _pod(self, pod: str) -> Inode:
        inode = await self._tree.lookup(ROOT, pod)
        if inode is None:
            raise NotFound(f"{pod}: no such pod")
        return inode

    async def _check_free(self, new: str) -> None:
        if not isinstance(new, str):
            raise ConfigError("the new pod's name must be text")
        paths.check_pod_name(new)
        if await self._tree.lookup(ROOT, new) is not None:
            raise AlreadyExists(f"{new}: there is a pod of that name")


_File = tuple[str, int, bool]


def _shown(recipe: Recipe, files: list[_File]) -> list[_File]:
    """As many as an answer can hold, what is executed first: padding must not hide it."""
    at = {path: at for at, path in reversed(list(enumerate(named(recipe.exec_argv))))}

    def rank(file: _File) -> tuple[int, int]:
        path = file[0]
        if path == recipe.file:
            return 0, 0
        if path in at:
            return 1, at[path]
        return (2 if f"{path}/".startswith(f"{recipe.script}/") else 3), 0

    shown: list[_File] = []
    left = FILES_SHOWN_BYTES
    for path, size, executable in sorted(files, key=rank)[:FILES_SHOWN]:
        left -= len(json.dumps(path[:500]))
        if left < 0:
            break
        shown.append((path[:500], size, executable))
    return shown
