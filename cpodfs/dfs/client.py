"""Every FairOS-DFS endpoint that the driver needs, one typed coroutine each.

Imports session, models, errors. Pods are opened when first needed and opened again once when
the server forgot them. Mutations are never repeated after they may have been carried out, and
the server has no locks: the caller must not run two mutations of one directory at a time.
"""

from __future__ import annotations

import posixpath
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Self, TypeVar

from cpodfs.dfs import _trees, models
from cpodfs.dfs._errors import StatusUnknown, upload_refusal
from cpodfs.dfs._flight import SingleFlight
from cpodfs.dfs._httpx import httpx
from cpodfs.dfs._multipart import MultipartFile, Source
from cpodfs.dfs.session import Session
from cpodfs.errors import BadReply, NameRefused, NotFound, PodNotFound, PodNotOpen

_T = TypeVar("_T")

MIN_BLOCK_SIZE = 1_000_000
MAX_BLOCK_SIZE = 8_000_000
INDEX_NAME = "index.dfs"
SHOWN_S = 5.0
"""For so long what the list of pods showed counts as there."""
_UPLOAD = "/v1/file/upload"
_DOWNLOAD = "/v1/file/download"


class Download:
    """A file on its way. ``size`` in bytes is known from the start; iterate once for the chunks.

    The iteration ends only after exactly ``size`` bytes, else it raises Unreachable (the
    connection was lost) or BadReply.
    """

    def __init__(self, size: int, chunks: AsyncIterator[bytes]) -> None:
        self.size = size
        self._chunks = chunks
        self._received = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            if self._received == self.size:
                raise
            text = f"ended at {self._received} of {self.size} bytes"
            raise BadReply(text, endpoint=_DOWNLOAD) from None
        self._received += len(chunk)
        if self._received > self.size:
            raise BadReply(f"more than the {self.size} bytes due", endpoint=_DOWNLOAD)
        return chunk


class Client:
    """All methods raise DfsError (or its kin) and NameRefused for text that is not UTF-8."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._open: dict[str, int] = {}  # pod → session generation in which it was opened
        self._openings = SingleFlight()
        self._shown: tuple[float, frozenset[str]] = (float("-inf"), frozenset())

    def __repr__(self) -> str:
        return f"Client({self.session!r})"

    # -- users -----------------------------------------------------------------------------

    async def signup(self, user: str, password: str, mnemonic: str | None = None) -> models.Account:
        """Create an account; needs funds on a real network (QuotaExceeded). Not repeated."""
        payload = {"userName": user, "password": password}
        if mnemonic is not None:
            payload["mnemonic"] = mnemonic
        endpoint = "/v2/user/signup"
        body = await self.session.call(
            "POST",
            endpoint,
            payload=_text(payload),
            authenticated=False,
            limit_s=self.session.timeouts.slow_s,
            secrets=(password, mnemonic or ""),
        )
        return models.account(body, endpoint, user=user)

    async def login(self) -> None:
        """Optional: every call logs in when needed. Raises LoginRefused."""
        await self.session.login()

    async def logout(self) -> None:
        if self.session.logged_in:
            await self.session.call("POST", "/v1/user/logout")
        self._open.clear()
        self.session.forget()

    async def user_present(self, user: str) -> bool:
        endpoint = "/v2/user/present"
        body = await self.session.call(
            "GET", endpoint, params=_text({"userName": user}), repeat=True, authenticated=False
        )
        return models.present(body, endpoint)

    async def delete_user(self, password: str) -> None:
        """Delete the account for good, with all its pods."""
        await self.session.call(
            "DELETE", "/v2/user/delete", payload=_text({"password": password}), secrets=(password,)
        )
        self._open.clear()
        self.session.forget()

    # -- pods ------------------------------------------------------------------------------

    async def pods(self) -> models.PodList:
        found = await self.session.parse("/v1/pod/ls", models.PodListParser)
        self._shown = (time.monotonic(), frozenset([*found.own, *found.shared]))
        return found

    async def create_pod(self, pod: str) -> None:
        """The new pod is open. Raises AlreadyExists, TooLong (64 bytes), QuotaExceeded."""
        await self._mutate("POST", "/v1/pod/new", podName=pod)
        self._open[pod] = self.session.generation

    async def open_pod(self, pod: str) -> None:
        """Open it unless it is. Slow on Swarm. Raises NotFound."""
        if self._open.get(pod) != self.session.generation or not self.session.logged_in:
            await self._openings.do(pod, lambda: self._open_now(pod))

    async def close_pod(self, pod: str) -> None:
        """Let the server forget what it keeps in memory of the pod; fine if it is not open."""
        self._open.pop(pod, None)
        try:
            await self.session.call("POST", "/v1/pod/close", payload=_text({"podName": pod}))
        except (NotFound, PodNotOpen):
            return

    async def delete_pod(self, pod: str) -> None:
        """With everything in it. For a received pod: forget it."""
        await self._mutate("DELETE", "/v1/pod/delete", slow=True, podName=pod)
        self._open.pop(pod, None)

    async def sync_pod(self, pod: str) -> None:
        """Make the server load what it has not loaded yet. It does NOT notice what another session
        changed in what it has: see ``refresh_pod``. Slow."""
        await self._in_pod(
            pod,
            lambda: self.session.call(
                "POST",
                "/v1/pod/sync",
                payload=_text({"podName": pod}),
                repeat=True,
                limit_s=self.session.timeouts.slow_s,
            ),
        )

    async def refresh_pod(self, pod: str) -> None:
        """Close and open it, so that the server sees what another session or the owner changed.

        Raises PodNotFound, and leaves it open, when the list of pods does not show it.
        """
        await self._need_shown(pod)
        await self.close_pod(pod)
        await self.open_pod(pod)

    async def pod_stat(self, pod: str) -> models.PodStat:
        endpoint = "/v1/pod/stat"
        body = await self.session.call("GET", endpoint, params=_text({"podName": pod}), repeat=True)
        return models.pod_stat(body, endpoint)

    async def pod_present(self, pod: str) -> bool:
        """Whether we own or have received it. Asks for the list, because the server's own
        ``pod/present`` says no, without an error, when the session has expired."""
        found = await self.pods()
        return pod in found.own or pod in found.shared

    async def share_pod(self, pod: str, name: str | None = None) -> str:
        """A reference that reads the pod for ever, and cannot be taken back: a secret."""
        payload = {"podName": pod} if name is None else {"podName": pod, "sharedPodName": name}
        endpoint = "/v1/pod/share"
        body = await self._in_pod(
            pod, lambda: self.session.call("POST", endpoint, payload=_text(payload))
        )
        return models.pod_reference(body, endpoint)

    async def receive_info(self, reference: str) -> models.ShareInfo:
        endpoint = "/v1/pod/receiveinfo"
        body = await self.session.call(
            "GET", endpoint, params=_text({"sharingRef": reference}), repeat=True
        )
        return models.share_info(body, endpoint)

    async def receive_pod(self, reference: str) -> None:
        """Add the pod to the received ones, under its owner's name for it. A GET that changes
        something, and is therefore not repeated."""
        await self.session.call("GET", "/v1/pod/receive", params=_text({"sharingRef": reference}))

    async def fork_pod(self, pod: str, new: str) -> None:
        """Copy it file by file on the server (minutes); modes and times are not kept. When it fails
        the new pod may exist nevertheless, empty or in part."""
        await self._mutate("POST", "/v1/pod/fork", slow=True, podName=pod, forkName=new)

    async def fork_from_reference(self, new: str, reference: str) -> None:
        await self._mutate(
            "POST",
            "/v1/pod/fork-from-reference",
            slow=True,
            forkName=new,
            podSharingReference=reference,
        )

    # -- directories -----------------------------------------------------------------------

    async def list_dir(self, pod: str, path: str) -> models.Listing:
        """A name missing from one listing is no proof of its deletion: the server leaves out
        children whose metadata it could not fetch just then. BadReply for a directory that is too
        large to be listed (``models.MAX_LISTING``)."""
        params = _text({"podName": pod, "dirPath": _path(path)})
        return await self._in_pod(
            pod, lambda: self.session.parse("/v1/dir/ls", models.ListingParser, params)
        )

    async def mkdir(self, pod: str, path: str) -> None:
        """Raises AlreadyExists (but not for a file of that name), NotFound (no parent), TooLong
        (100 bytes)."""
        await self._change(pod, "POST", "/v1/dir/mkdir", dirPath=_path(path))

    async def rmdir(self, pod: str, path: str, *, check: bool = True) -> None:
        """Remove an empty directory. Raises NotEmpty, NotFound, NameRefused (for the root).

        The server removes recursively and, below the first level, edits the wrong list: see
        ``_trees``. So a nested directory is first moved to the pod's root: that is a mutation of
        the root, too. ``check=False`` leaves out the question whether it is empty: RECURSIVE.
        """
        await _trees.remove_dir(self, pod, path, check=check)

    async def sweep(self, pod: str) -> int:
        """Remove what an ``rmdir`` that was cut short left in the root; returns how many.

        Their names match ``DOOMED``: do not show them.
        """
        return await _trees.sweep(self, pod)

    async def stat_dir(self, pod: str, path: str) -> models.DirStat:
        body = await self._get(pod, "/v1/dir/stat", dirPath=_path(path))
        return models.dir_stat(body, "/v1/dir/stat")

    async def rename_dir(self, pod: str, old: str, new: str) -> None:
        """Move a directory with all its content; its parents must not change meanwhile.

        Never atomic: the server moves child by child, and where its own way would lose
        directories (see ``_trees``) we do. Lists the whole sub-tree first. Raises AlreadyExists
        for a taken name, NotFound also when ``new``'s parent is missing, NameRefused for a move
        into itself. After an error that is ``half_done`` look what is where.
        """
        await _trees.rename_dir(self, pod, old, new)

    async def relist_dir(self, pod: str, path: str) -> None:
        """Give a directory that the one above does not list any more its entry back. Raises as
        ``rename_dir``; if it breaks off, the directory may be listed as ``found-…`` beside its place."""
        await _trees.relist_dir(self, pod, path)

    async def raw_rmdir(self, pod: str, path: str) -> None:
        """The endpoint as it is, with the dangers described in ``_trees``."""
        await self._change(pod, "DELETE", "/v1/dir/rmdir", slow=True, dirPath=_path(path))

    async def raw_rename_dir(self, pod: str, old: str, new: str) -> None:
        """The endpoint as it is, with the dangers described in ``_trees``."""
        await self._change(
            pod, "POST", "/v1/dir/rename", slow=True, oldPath=_path(old), newPath=_path(new)
        )

    async def chmod_dir(self, pod: str, path: str, mode: int) -> None:
        bits = stat.S_IFDIR | stat.S_IMODE(mode)
        await self._change(pod, "POST", "/v1/dir/chmod", dirPath=_path(path), mode=str(bits))

    # -- files -----------------------------------------------------------------------------

    async def upload(
        self,
        pod: str,
        dir_path: str,
        name: str,
        body: Source,
        size: int,
        *,
        block_size: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Create or overwrite a file with the ``size`` bytes of ``body()``; its mode becomes 0600.

        ``body`` is called anew for the one repeat after an expired session. What it raises comes
        out unchanged, with the old file untouched; ChangedDuringUpload when it yields another
        number of bytes. ``on_progress`` gets the bytes handed over so far. After any other
        error with ``sent``, look before you repeat: the file may be stored, or unlisted.
        """
        fields = {
            "podName": pod,
            "dirPath": _path(dir_path),
            "blockSize": str(_block_size(size) if block_size is None else block_size),
            "overwrite": "true",
        }
        _text(fields)
        _check_upload_name(name)

        def make_body() -> MultipartFile:
            return MultipartFile(fields, name, body, size, on_progress)

        reply = await self._in_pod(pod, lambda: self.session.send_file(_UPLOAD, make_body))
        complaint = models.upload_failure(reply, _UPLOAD)
        if complaint is not None:
            raise upload_refusal(complaint, _UPLOAD)

    @asynccontextmanager
    async def download(self, pod: str, path: str) -> AsyncIterator[Download]:
        """``async with`` it, then iterate. The whole file or nothing: there are no ranges, but
        leaving early is fine. Raises NotFound."""
        params = _text({"podName": pod, "filePath": _path(path)})
        await self.open_pod(pod)
        async with self._opened_stream(pod, params) as response:
            size = _announced_size(response)
            async with aclosing(self.session.chunks(response, _DOWNLOAD)) as chunks:
                yield Download(size, chunks)

    @asynccontextmanager
    async def _opened_stream(
        self, pod: str, params: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """The stream; once more from the start when the server had closed the pod."""
        async with AsyncExitStack() as stack:
            try:
                response = await stack.enter_async_context(
                    self.session.open_stream(_DOWNLOAD, params)
                )
            except PodNotOpen:
                self._open.pop(pod, None)
                await self.open_pod(pod)
                response = await stack.enter_async_context(
                    self.session.open_stream(_DOWNLOAD, params)
                )
            yield response

    async def stat_file(self, pod: str, path: str) -> models.FileStat:
        body = await self._get(pod, "/v1/file/stat", filePath=_path(path))
        return models.file_stat(body, "/v1/file/stat")

    async def file_status(self, pod: str, path: str) -> models.FileStatus | None:
        """How much of the file Swarm has; None when the server does not know.

        It knows of what this session uploaded since the pod was opened. Raises NotFound.
        """
        endpoint = "/v1/file/status"
        try:
            body = await self._get(pod, endpoint, filePath=_path(path))
        except StatusUnknown:
            return None
        return models.file_status(body, endpoint)

    async def delete_file(self, pod: str, path: str) -> None:
        await self._change(pod, "DELETE", "/v1/file/delete", filePath=_path(path))

    async def rename_file(self, pod: str, old: str, new: str) -> None:
        """Raises AlreadyExists for the name of another file (but not for a directory's: see to
        that), NotFound also when ``new``'s parent is missing. Not atomic: between the old name's
        end and the new one's beginning the server holds the file under neither."""
        folder = posixpath.dirname(new)
        if folder != posixpath.dirname(old):
            # The server would take the file out of its old directory, and only then look.
            await self.stat_dir(pod, folder)
        await self._change(pod, "POST", "/v1/file/rename", oldPath=_path(old), newPath=_path(new))

    async def chmod_file(self, pod: str, path: str, mode: int) -> None:
        bits = stat.S_IFREG | stat.S_IMODE(mode)
        await self._change(pod, "POST", "/v1/file/chmod", filePath=_path(path), mode=str(bits))

    async def share_file(self, pod: str, path: str, user: str) -> str:
        """A reference by which ``user`` can take a copy of the file."""
        body = await self._change(
            pod, "POST", "/v1/file/share", filePath=_path(path), destUser=user
        )
        return models.file_reference(body, "/v1/file/share")

    async def receive_file(self, pod: str, dir_path: str, reference: str) -> str:
        """Put a shared file into a directory; returns its path in the pod. Not repeated."""
        endpoint = "/v1/file/receive"
        params = _text({"podName": pod, "dirPath": _path(dir_path), "sharingRef": reference})
        body = await self._in_pod(pod, lambda: self.session.call("GET", endpoint, params=params))
        return models.received_name(body, endpoint)

    # -- how calls are made ----------------------------------------------------------------

    async def _get(self, pod: str, endpoint: str, **params: str) -> bytes:
        query = _text({"podName": pod, **params})
        return await self._in_pod(
            pod, lambda: self.session.call("GET", endpoint, params=query, repeat=True)
        )

    async def _change(
        self, pod: str, method: str, endpoint: str, *, slow: bool = False, **fields: str
    ) -> bytes:
        return await self._in_pod(
            pod, lambda: self._mutate(method, endpoint, slow=slow, podName=pod, **fields)
        )

    async def _mutate(
        self, method: str, endpoint: str, *, slow: bool = False, **fields: str
    ) -> bytes:
        limit_s = self.session.timeouts.slow_s if slow else None
        return await self.session.call(method, endpoint, payload=_text(fields), limit_s=limit_s)

    async def _in_pod(self, pod: str, call: Callable[[], Awaitable[_T]]) -> _T:
        await self.open_pod(pod)
        opened = self._open.get(pod)
        try:
            return await call()
        except PodNotOpen:
            if self._open.get(pod) == opened:
                self._open.pop(pod, None)
            await self.open_pod(pod)
            return await call()

    async def _need_shown(self, pod: str) -> None:
        """Raise PodNotFound unless the list of pods has it.

        A server that cannot read the list just then says, when it is to open a pod, that there is none
        of that name, and stores the list anew, empty: all pods are lost. To list them is harmless.
        """
        listed_s, shown = self._shown
        if time.monotonic() - listed_s > SHOWN_S or pod not in shown:
            found = await self.pods()
            shown = frozenset([*found.own, *found.shared])
        if pod not in shown:
            raise PodNotFound(f"{pod}: the list of pods does not have it", endpoint="/v1/pod/ls")

    async def _open_now(self, pod: str) -> None:
        await self._need_shown(pod)
        await self.session.call(
            "POST",
            "/v1/pod/open",
            payload=_text({"podName": pod}),
            repeat=True,
            limit_s=self.session.timeouts.slow_s,
        )
        self._open[pod] = self.session.generation


def _text(fields: dict[str, str]) -> dict[str, str]:
    """Refuse what cannot be sent as UTF-8 (a name with undecodable bytes): JSON would mangle it."""
    for value in fields.values():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise NameRefused(f"not valid UTF-8: {value!r}") from None
    return fields


def _path(path: str) -> str:
    """Refuse what the server takes differently, or for which it breaks off without an answer."""
    parts = path.split("/")
    if path != "/" and (
        not path.startswith("/") or any(part in ("", ".", "..") for part in parts[1:])
    ):
        raise NameRefused(f"not an absolute path in its plainest form: {path!r}")
    if INDEX_NAME in parts:
        raise NameRefused(f"{INDEX_NAME} is the server's own")
    return path


def _check_upload_name(name: str) -> None:
    _text({"name": name})
    if name == INDEX_NAME:
        raise NameRefused(f"{INDEX_NAME} is the server's own: uploading it destroys the directory")
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise NameRefused(f"the server cannot store a file of this name: {name!r}")


def _block_size(size: int) -> int:
    """Few, even blocks: one for a small file, the largest for a big one."""
    return min(max(size, MIN_BLOCK_SIZE), MAX_BLOCK_SIZE)


def _announced_size(response: httpx.Response) -> int:
    length = response.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()) or len(length) > 19:
        raise BadReply("no usable Content-Length", endpoint=_DOWNLOAD)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise BadReply("an encoded body was sent though none was asked for", endpoint=_DOWNLOAD)
    return int(length)
