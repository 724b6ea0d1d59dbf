"""The FairOS-DFS client: `Session` logs in, `Client` has one coroutine per endpoint.

Imports errors only, from outside this package. The server's contract and its quirks are in the
docstrings of `client`; what a reply means is decided in `_errors`.
"""

from __future__ import annotations

from cpodfs.dfs._trees import DOOMED
from cpodfs.dfs.client import MAX_BLOCK_SIZE, Client, Download
from cpodfs.dfs.models import (
    Account,
    DirStat,
    Entry,
    FileShareInfo,
    FileStat,
    FileStatus,
    Listing,
    PodList,
    PodStat,
    ShareInfo,
)
from cpodfs.dfs.session import Session, Stats, Timeouts

__all__ = [
    "DOOMED",
    "MAX_BLOCK_SIZE",
    "Account",
    "Client",
    "DirStat",
    "Download",
    "Entry",
    "FileShareInfo",
    "FileStat",
    "FileStatus",
    "Listing",
    "PodList",
    "PodStat",
    "Session",
    "ShareInfo",
    "Stats",
    "Timeouts",
]
