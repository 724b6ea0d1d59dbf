"""Removing and moving directories without the losses that the server's own way would cause.

Imports errors and models. What the server does (seen on commit bf04d9eb): removing ``/a/b`` takes
"b" out of the list of ``/``, not of ``/a``. A ``/b`` is then lost from view, and ``/a`` can never
be removed. Moving a directory does the same for each sub-directory that moves along. Right are:
removing in the root, and moving a directory that has no sub-directories. Besides, moving one whose
sub-tree was not listed crashes the call half-way, and moving to a missing parent loses it all.
"""

from __future__ import annotations

import posixpath
import re
import secrets
from typing import TYPE_CHECKING

from cpodfs.errors import AlreadyExists, DfsError, NameRefused, NotEmpty, NotFound

if TYPE_CHECKING:
    from cpodfs.dfs.client import Client
    from cpodfs.dfs.models import Listing

# A directory of this name in a pod's root was about to be removed when we died.
DOOMED_PREFIX = ".cpodfs-rm-"
DOOMED = re.compile(re.escape(DOOMED_PREFIX) + "[0-9a-f]{16}")

_Tree = dict[str, "Listing"]  # path of each directory → its children


async def remove_dir(client: Client, pod: str, path: str, *, check: bool) -> None:
    if path == "/":
        raise NameRefused("the root of a pod cannot be removed, only the pod")
    if check:
        await _require_empty(client, pod, path)
    if posixpath.dirname(path) != "/":
        doomed = f"/{DOOMED_PREFIX}{secrets.token_hex(8)}"
        await client.raw_rename_dir(pod, path, doomed)
        path = doomed
    await client.raw_rmdir(pod, path)


async def sweep(client: Client, pod: str) -> int:
    names = [name for name in await _subdirs(client, pod, "/") if DOOMED.fullmatch(name)]
    for name in names:
        await client.raw_rmdir(pod, f"/{name}")
    return len(names)


async def rename_dir(client: Client, pod: str, old: str, new: str) -> None:
    if old == "/" or new.startswith(old + "/"):
        raise NameRefused(f"a directory cannot move into itself: {old!r} to {new!r}")
    await client.stat_dir(pod, posixpath.dirname(new))
    siblings = await _subdirs(client, pod, posixpath.dirname(old))
    tree: _Tree = {}
    await _list_tree(client, pod, old, tree)
    await _move(client, pod, old, new, tree, siblings)


async def relist_dir(client: Client, pod: str, path: str) -> None:
    """The server lists a directory where it is renamed to."""
    above, name = posixpath.split(path)
    if name in await _subdirs(client, pod, above):
        return
    found = posixpath.join(above, f"found-{secrets.token_hex(4)}")
    await rename_dir(client, pod, path, found)
    await rename_dir(client, pod, found, path)


async def _move(
    client: Client, pod: str, old: str, new: str, tree: _Tree, siblings: set[str]
) -> None:
    """``siblings`` are the names of the directories beside ``old``."""
    if not _would_lose(tree, old, siblings):
        await client.raw_rename_dir(pod, old, new)
        return
    await _refuse_taken(client, pod, new)
    await client.mkdir(pod, new)
    try:
        await _move_children(client, pod, old, new, tree)
        mode = (await client.stat_dir(pod, old)).mode
        await client.chmod_dir(pod, new, mode)
        await remove_dir(client, pod, old, check=True)
    except DfsError as error:
        error.half_done = True
        raise


async def _move_children(client: Client, pod: str, old: str, new: str, tree: _Tree) -> None:
    dirs = {entry.name for entry in tree[old] if entry.is_dir}
    children = {entry.name: entry for entry in tree[old]}  # a name can be listed twice
    for entry in children.values():
        source, target = posixpath.join(old, entry.name), posixpath.join(new, entry.name)
        if entry.is_dir:
            await _move(client, pod, source, target, tree, dirs)
            dirs.discard(entry.name)
        else:
            await client.rename_file(pod, source, target)


def _would_lose(tree: _Tree, old: str, siblings: set[str]) -> bool:
    """Whether a sub-directory moving along bears the name of one two levels above itself."""
    for path, children in tree.items():
        if path != old and not path.startswith(old + "/"):
            continue
        if path == old:
            beside = siblings
        else:
            beside = {entry.name for entry in tree[posixpath.dirname(path)] if entry.is_dir}
        if any(entry.is_dir and entry.name in beside for entry in children):
            return True
    return False


async def _list_tree(client: Client, pod: str, path: str, tree: _Tree) -> None:
    pending = [path]
    while pending:
        folder = pending.pop()
        tree[folder] = await client.list_dir(pod, folder)
        pending += [posixpath.join(folder, entry.name) for entry in tree[folder] if entry.is_dir]


async def _subdirs(client: Client, pod: str, path: str) -> set[str]:
    return {entry.name for entry in await client.list_dir(pod, path) if entry.is_dir}


async def _require_empty(client: Client, pod: str, path: str) -> None:
    stat = await client.stat_dir(pod, path)
    if stat.dirs or stat.files:
        raise NotEmpty(f"{stat.dirs} directories and {stat.files} files are in {path!r}")


async def _refuse_taken(client: Client, pod: str, path: str) -> None:
    try:
        await client.stat_dir(pod, path)
    except NotFound:
        return
    raise AlreadyExists(f"directory name already present: {path!r}")
