"""Metadata as rows and as the JSON that clients see: sizes and times as decimal strings.

Imports nothing of ours. Field names and order are the real server's; ``FILE_COLUMNS`` and ``File``
are the same list and must stay so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FILE_COLUMNS = (
    "parent, name, size, block_size, compression, content_type, mode, ctime, mtime, atime, blob"
)


@dataclass(frozen=True)
class File:
    """A file's metadata. Sizes in bytes, times in Unix seconds; ``blob`` '' = empty content."""

    parent: str
    name: str
    size: int
    block_size: int
    compression: str
    content_type: str
    mode: int
    ctime: int
    mtime: int
    atime: int
    blob: str


@dataclass(frozen=True)
class Content:
    """What was uploaded: where it lies and what is known of it."""

    blob: str
    size: int
    content_type: str


def dir_entry(name: str, mode: int, ctime: int, mtime: int, atime: int) -> dict[str, Any]:
    return {
        "name": name,
        "contentType": "inode/directory",
        "mode": mode,
        "creationTime": str(ctime),
        "modificationTime": str(mtime),
        "accessTime": str(atime),
    }


def file_entry(
    name: str, kind: str, size: int, block: int, mode: int, ctime: int, mtime: int, atime: int
) -> dict[str, Any]:
    return {
        "name": name,
        "contentType": kind,
        "size": str(size),
        "blockSize": str(block),
        "creationTime": str(ctime),
        "modificationTime": str(mtime),
        "accessTime": str(atime),
        "mode": mode,
    }


def file_metadata(file: File) -> dict[str, Any]:
    return {
        "version": 2,
        "filePath": file.parent,
        "fileName": file.name,
        "fileSize": file.size,
        "blockSize": file.block_size,
        "contentType": file.content_type,
        "compression": file.compression,
        "creationTime": file.ctime,
        "accessTime": file.atime,
        "modificationTime": file.mtime,
        "fileInodeReference": file.blob,
        "mode": file.mode,
    }
