"""Transfers between a container and a URL: gftp in both directions, http(s) from loopback.

Imports `container`, `gftp`, `rest`. Runs in the provider's process, which is not confined: what a
URL or a container path leads to is decided by `gftp.Registry` and `Container` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
from yarl import URL

from cpodfs.devnet.container import Container, ContainerError, Throttle
from cpodfs.devnet.gftp import URL_PREFIX, GftpError, Registry
from cpodfs.devnet.rest import Json

_CHUNK = 1 << 18
_PROGRESS_EVERY_S = 0.5
_CONTAINER = "container:"
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=60)

Progress = Callable[[Json], None]


class Transfers:
    """What one market's providers transfer with. Use as an async context manager."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Transfers:
        self._http = aiohttp.ClientSession(timeout=_HTTP_TIMEOUT)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def transfer(
        self,
        container: Container,
        source: str,
        target: str,
        bytes_s: float | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Carry out one ``transfer`` command. Raises ContainerError with what went wrong."""
        try:
            if target.startswith(_CONTAINER):
                chunks, size = await self._download(source)
                handle = container.open_to_write(target.removeprefix(_CONTAINER))
                await _copy(chunks, handle, size, bytes_s, on_progress)
            elif source.startswith(_CONTAINER):
                handle = container.open_to_read(source.removeprefix(_CONTAINER))
                size = os.fstat(handle).st_size
                await self._upload(_read(handle), target, size, bytes_s, on_progress)
            else:
                raise ContainerError(f"one end must be {_CONTAINER}/…")
        except (GftpError, OSError, aiohttp.ClientError, TimeoutError) as error:
            raise ContainerError(str(error) or type(error).__name__) from None

    async def _download(self, url: str) -> tuple[AsyncIterator[bytes], int]:
        if url.startswith(URL_PREFIX):
            link = self._registry.resolve(url)
            if link.mode != "publish":
                raise ContainerError(f"{url}: cannot be read")
            handle = link.open_to_read()
            return _read(handle), os.fstat(handle).st_size
        response = await self._session().get(_loopback(url), allow_redirects=False)
        if response.status != 200:
            response.release()
            raise ContainerError(f"{url}: HTTP status {response.status}")
        return response.content.iter_chunked(_CHUNK), response.content_length or 0

    async def _upload(
        self,
        chunks: AsyncIterator[bytes],
        url: str,
        size: int,
        bytes_s: float | None,
        on_progress: Progress | None,
    ) -> None:
        if url.startswith(URL_PREFIX):
            link = self._registry.resolve(url)
            if link.mode != "receive":
                raise ContainerError(f"{url}: cannot be written to")
            with link.parent() as parent:
                await _replace(parent, link.path.name, chunks, size, bytes_s, on_progress)
            return
        paced = _paced(chunks, size, bytes_s, on_progress)
        async with self._session().put(_loopback(url), data=paced) as response:
            if response.status >= 300:
                raise ContainerError(f"{url}: HTTP status {response.status}")

    def _session(self) -> aiohttp.ClientSession:
        assert self._http is not None, "used outside its context"
        return self._http


def _loopback(url: str) -> URL:
    parsed = URL(url)
    if parsed.scheme not in {"http", "https"}:
        raise ContainerError(f"{url}: this kind of URL is not supported")
    if parsed.host not in _LOOPBACK:
        raise ContainerError(f"{url}: the local market has no way out to the internet")
    return parsed


async def _replace(
    parent: int,
    name: str,
    chunks: AsyncIterator[bytes],
    size: int,
    bytes_s: float | None,
    on_progress: Progress | None,
) -> None:
    """Write beside the file and move over it: nobody sees half a file there."""
    draft = f".{name}.{secrets.token_hex(6)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(draft, flags, 0o644, dir_fd=parent)
    try:
        await _copy(chunks, handle, size, bytes_s, on_progress)
        await asyncio.to_thread(os.replace, draft, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=parent)
        raise


async def _copy(
    chunks: AsyncIterator[bytes],
    handle: int,
    size: int,
    bytes_s: float | None,
    on_progress: Progress | None,
) -> None:
    """Write all chunks to ``handle`` and close it."""
    with os.fdopen(handle, "wb") as file:
        async for chunk in _paced(chunks, size, bytes_s, on_progress):
            await asyncio.to_thread(file.write, chunk)


async def _read(handle: int) -> AsyncIterator[bytes]:
    with os.fdopen(handle, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk


async def _paced(
    chunks: AsyncIterator[bytes],
    size: int,
    bytes_s: float | None,
    on_progress: Progress | None,
) -> AsyncIterator[bytes]:
    """The same chunks, at most ``bytes_s`` a second, with reports of how far it is."""
    throttle, done, reported = Throttle(bytes_s), 0, time.monotonic()
    async for chunk in chunks:
        yield chunk
        done += len(chunk)
        await throttle.sent(len(chunk))
        if on_progress and time.monotonic() - reported >= _PROGRESS_EVERY_S:
            reported = time.monotonic()
            on_progress(_progress(done, size))
    if on_progress:
        on_progress(_progress(done, size))


def _progress(done: int, size: int) -> Json:
    return {"step": [0, 1], "message": None, "progress": [done, max(size, done)], "unit": "Bytes"}
