"""Which pod something is in, and whether it may be written to; errors as POSIX has them.

Imports the cache. Functions of the store alone, for whoever in this package needs them.
"""

from __future__ import annotations

import errno
import os

from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Inode, Store


def oserror(code: int, what: object = None) -> OSError:
    return OSError(code, os.strerror(code), what)


def inode_of(store: Store, ino: int) -> Inode:
    """The inode, which the kernel has been told of. Raises ENOENT when it is no more."""
    inode = store.get(ino)
    if inode is None:
        raise oserror(errno.ENOENT)
    return inode


def pod_of(store: Store, ino: int) -> Inode | None:
    """The pod that the inode is in (or is); None for the root and for what has no name."""
    above = store.ancestors(ino)
    return above[-1] if above and above[-1].parent == ROOT else None


def check_writable(store: Store, ino: int) -> None:
    """Raise EROFS in a pod that was received from somebody else."""
    pod = pod_of(store, ino)
    remote = store.remote_of(pod.ino) if pod is not None else None
    if remote is not None and remote.readonly:
        raise oserror(errno.EROFS, pod.name if pod else None)
