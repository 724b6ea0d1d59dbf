"""What most contract cases do: write, read and list through the client."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncIterator

from cpodfs.dfs import Client, Entry


async def write(client: Client, path: str, data: bytes, pod: str = "pod") -> None:
    async def body() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 1 << 18):
            yield data[start : start + (1 << 18)]

    folder, name = posixpath.split(path)
    await client.upload(pod, folder, name, body, len(data))


async def read(client: Client, path: str, pod: str = "pod") -> bytes:
    async with client.download(pod, path) as download:
        data = b"".join([chunk async for chunk in download])
        assert len(data) == download.size
        return data


async def listed(client: Client, path: str = "/", pod: str = "pod") -> dict[str, Entry]:
    return {entry.name: entry for entry in await client.list_dir(pod, path)}


async def names(client: Client, path: str = "/", pod: str = "pod") -> list[str]:
    """Sorted, directories with a slash."""
    entries = list(await client.list_dir(pod, path))
    return sorted(entry.name + "/" * entry.is_dir for entry in entries)
