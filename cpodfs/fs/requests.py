"""Questions and orders of the commands, each with an answer: ``user.cpodfs.request.<id>``.

Imports the tree, the DFS client and the control files. A request is JSON, set as an attribute of the
mount's root, and its answer is read once from the same attribute. The root, because a program in a
sandbox sees its pod's folder only: it cannot vouch for itself. Answers may be secret.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from cpodfs import paths
from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Inode
from cpodfs.dfs import Client
from cpodfs.errors import AlreadyExists, ConfigError, CpodfsError, NotFound, NotTrusted
from cpodfs.fs.control import RunFiles
from cpodfs.fs.guard import Guard
from cpodfs.fs.pods import check_writable
from cpodfs.fs.tree import Tree

log = logging.getLogger(__name__)

ANSWERS_KEPT = 64
ANSWER_LIMIT_BYTES = 60_000
"""An attribute's value has 64 KiB at most."""
FILES_SHOWN = 100
RECORD_KEYS = ("state", "exit_code", "signal", "error", "started", "ended", "log")

Answer = dict[str, Any]


def _encoded(answer: Answer) -> bytes:
    encoded = json.dumps(answer).encode()
    if len(encoded) > ANSWER_LIMIT_BYTES:
        return json.dumps({"error": "the answer is too long"}).encode()
    return encoded


class Requests:
    """``refresh``: look at the server's list of pods, now."""

    def __init__(
        self,
        tree: Tree,
        runs: RunFiles,
        guard: Guard,
        dfs: Client,
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        self._tree = tree
        self._runs = runs
        self._guard = guard
        self._dfs = dfs
        self._refresh = refresh
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
            answer = {"error": f"{error.filename or 'failed'}: {error.strerror}"}
        except (ValueError, KeyError, TypeError, AttributeError):
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

    async def _trust(self, pod: str) -> Answer:
        what = await self._runs.recipe((await self._pod(pod)).ino)
        sheet = await self._guard.fingerprint(what)
        return {
            "own": self._guard.book.is_own(pod),
            "trusted": self._guard.book.trusted(pod),
            "hash": sheet.hexdigest(),
            "recipe": what.recipe.file,
            "recipe_sha256": hashlib.sha256(what.raw).hexdigest(),
            "files": [(path[:500], size, x) for path, size, x in sheet.files[1:][:FILES_SHOWN]],
            "count": len(sheet.files) - 1,
        }

    async def _confirm(self, pod: str, digest: str) -> Answer:
        what = await self._runs.recipe((await self._pod(pod)).ino)
        if (await self._guard.fingerprint(what)).hexdigest() != digest:
            raise NotTrusted(f"{pod}: changed while you looked; look again")
        self._guard.book.trust(pod, digest)
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
        own = self._guard.book.is_own(pod)
        await self._dfs.fork_pod(pod, new)
        await self._refresh()
        await self._pod(new)
        if own:
            self._guard.book.own(new)
        return {"pod": new, "own": own}

    async def _share(self, pod: str) -> Answer:
        await self._pod(pod)
        return {"reference": await self._dfs.share_pod(pod)}

    async def _receive(self, reference: str, new: str | None) -> Answer:
        if new is not None:
            await self._check_free(new)
        # First of all, because a fork of nothing is no error to the server.
        name = (await self._dfs.receive_info(reference)).pod
        if new is None:
            await self._dfs.receive_pod(reference)
        else:
            await self._dfs.fork_from_reference(new, reference)
        await self._refresh()
        await self._pod(new or name)
        return {"pod": new or name}

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
