"""The endpoints about directories and files, but for the two that move content.

Imports the devnet's own modules. ``changing`` is where concurrent changes of one directory lose
entries when the fault asks for it; every mutation of a directory list goes through it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_model import Refusal
from cpodfs.devnet.dfs_record import File
from cpodfs.devnet.dfs_routes import SESSION_OR_POD, Call, Endpoint, Reply
from cpodfs.devnet.dfs_tree import Tree

T = TypeVar("T")


async def changing(call: Call, tree: Tree, paths: set[str], change: Callable[[], T]) -> T:
    """Make a change that rewrites the lists of the directories ``paths``."""
    faults = call.server.box.faults
    if faults.directory_race:
        stale = tree.lists(paths)
        await asyncio.sleep(faults.race_window_s)
        tree.restore_lists(stale)
    return change()


async def _mkdir(call: Call) -> Reply:
    tree, path = call.tree(), call.args["dirPath"]
    await changing(call, tree, {m.parent_of(path)}, lambda: tree.mkdir(path))
    call.session.listed.add((tree.pod, m.dir_key(path)))
    return {"message": "directory created successfully"}


async def _rmdir(call: Call) -> Reply:
    tree, path = call.tree(), call.args["dirPath"]
    await changing(call, tree, {m.parent_of(path)}, lambda: tree.rmdir(path))
    return {"message": "directory removed successfully"}


async def _ls(call: Call) -> Reply:
    tree, path = call.tree(), call.args["dirPath"]
    dirs, files = tree.ls(path)
    found = {path, *(m.join(path, entry["name"]) for entry in dirs)}
    call.session.listed |= {(tree.pod, m.dir_key(name)) for name in found}
    return ({"dirs": dirs} if dirs else {}) | ({"files": files} if files else {})


async def _stat_dir(call: Call) -> Reply:
    return call.tree().stat_dir(call.args["podName"], call.args["dirPath"])


async def _dir_present(call: Call) -> Reply:
    try:
        return {"present": call.tree().has_dir(call.args["dirPath"])}
    except Refusal as refusal:
        return {"present": False, "error": str(refusal)}


async def _rename_dir(call: Call) -> Reply:
    tree, old, new = call.tree(), call.args["oldPath"], call.args["newPath"]
    if call.server.box.faults.rename_needs_listing:
        _need_listed(call, tree, old)
    parents = {m.parent_of(old), m.parent_of(new)}
    await changing(call, tree, parents, lambda: tree.rename_dir(old, new))
    return {"message": "directory renamed successfully"}


def _need_listed(call: Call, tree: Tree, path: str) -> None:
    for kind, name in tree.entries(path):
        child = m.join(path, name)
        if kind == "D" and tree.has_dir(child):
            if (tree.pod, child) not in call.session.listed:
                raise m.Panic(child)
            _need_listed(call, tree, child)


def _mode(label: str, call: Call) -> int:
    try:
        return m.parse_mode(call.args["mode"])
    except Refusal as refusal:
        raise Refusal(f"{label}: invalid mode: {refusal}") from None


async def _chmod_dir(call: Call) -> Reply:
    mode = _mode("dir chmod", call)
    tree, path = call.tree(), call.args["dirPath"]
    # Its mode and its list are one object, and are rewritten together.
    await changing(call, tree, {path}, lambda: tree.chmod_dir(path, mode))
    return {"message": "directory renamed successfully"}


async def _stat_file(call: Call) -> Reply:
    return call.tree().stat_file(call.args["podName"], call.args["filePath"])


async def _status(call: Call) -> Reply:
    """How much of what this session uploaded Swarm has, until it closes the pod.

    A Bee node of version 2 says nothing of the total in the terms that the server looks for.
    """
    session, path = call.session, call.args["filePath"]
    pod = call.server.pod_in_use(session, call.args["podName"])
    found = call.server.tree(pod, session).need_file(path)
    uploaded = session.tagged.get((pod.address, path))
    if uploaded is None:
        raise Refusal("file status is not available")
    faults, total = call.server.box.faults, m.chunks_of_upload(found.size, found.block_size)
    age_s = time.monotonic() - uploaded
    synced = total if age_s >= faults.swarm_delay_s else int(total * age_s / faults.swarm_delay_s)
    known = total if faults.status_has_total else 0
    return {"total": known, "processed": known, "synced": synced}


async def _delete_file(call: Call) -> Reply:
    tree, path = call.tree(), call.args["filePath"]
    await changing(call, tree, {m.parent_of(path)}, lambda: tree.rm_file(path))
    return {"message": "file deleted successfully"}


async def _rename_file(call: Call) -> Reply:
    tree, old, new = call.tree(), call.args["oldPath"], call.args["newPath"]
    parents = {m.parent_of(old), m.parent_of(new)}
    await changing(call, tree, parents, lambda: tree.rename_file(old, new))
    return {"message": "file renamed successfully"}


async def _chmod_file(call: Call) -> Reply:
    mode = _mode("file chmod", call)
    call.tree().chmod_file(call.args["filePath"], mode)
    return {"message": "file mode changed successfully"}


async def _share_file(call: Call) -> Reply:
    session = call.session
    pod = call.server.pod_in_use(session, call.args["podName"])
    found = call.server.tree(pod, session).file(call.args["filePath"])
    if found is None:
        raise Refusal("feed does not exist or was not updated yet")
    body = {
        "file": vars(found),
        "sender": pod.address,
        "receiver": call.args["destUser"],
        "sharedTime": str(int(time.time())),
    }
    return {"fileSharingReference": call.server.store.new_share("file", body, found.blob)}


async def _receive_file_info(call: Call) -> Reply:
    _ = call.session
    body = call.server.store.share("file", call.args["sharingRef"])
    shared = File(**body["file"])
    return {
        "name": shared.name,
        "size": str(shared.size),
        "blockSize": str(shared.block_size),
        "numberOfBlocks": str(-(-shared.size // shared.block_size)),
        "contentType": shared.content_type,
        "compression": shared.compression,
        "sourceAddress": body["sender"],
        "destAddress": body["receiver"],
        "sharedTime": body["sharedTime"],
    }


async def _receive_file(call: Call) -> Reply:
    _ = call.session
    path, now = call.args["dirPath"], int(time.time())
    body = call.server.store.share("file", call.args["sharingRef"])
    tree = call.tree()
    fields = body["file"] | {"parent": path, "mode": 0, "ctime": now, "mtime": now, "atime": now}
    received = File(**fields)
    key = await changing(call, tree, {path}, lambda: tree.add_received(path, received))
    return {"fileName": key}


_DIR = ("podName", "dirPath")
_FILE = ("podName", "filePath")
_MOVE = ("podName", "oldPath", "newPath")
_LS = SESSION_OR_POD | {m.DIR_NOT_PRESENT: 404}
_NOT_OPEN = {m.POD_NOT_OPEN: 400}

ENDPOINTS = (
    Endpoint(
        "POST", "/v1/dir/mkdir", "mkdir", _mkdir, needs=_DIR, statuses=SESSION_OR_POD, success=201
    ),
    Endpoint("DELETE", "/v1/dir/rmdir", "rmdir", _rmdir, needs=_DIR, statuses=SESSION_OR_POD),
    Endpoint("GET", "/v1/dir/ls", "ls", _ls, needs=_DIR, statuses=_LS, in_query=True),
    Endpoint(
        "GET",
        "/v1/dir/stat",
        "dir stat",
        _stat_dir,
        needs=_DIR,
        statuses=SESSION_OR_POD,
        in_query=True,
        arg_labels={"podName": "dir", "dirPath": "dir present"},
    ),
    Endpoint("GET", "/v1/dir/present", "dir present", _dir_present, needs=_DIR, in_query=True),
    Endpoint(
        "POST", "/v1/dir/rename", "rename-dir", _rename_dir, needs=_MOVE, statuses=SESSION_OR_POD
    ),
    Endpoint(
        "POST",
        "/v1/dir/chmod",
        "dir chmod",
        _chmod_dir,
        needs=(*_DIR, "mode"),
        default_status=400,
        plain_refusals=True,
    ),
    Endpoint(
        "GET",
        "/v1/file/stat",
        "file stat",
        _stat_file,
        needs=_FILE,
        statuses=_NOT_OPEN,
        in_query=True,
    ),
    Endpoint(
        "GET",
        "/v1/file/status",
        "status",
        _status,
        needs=_FILE,
        statuses=_NOT_OPEN | {m.FILE_NOT_FOUND: 404},
        in_query=True,
        bare="work",
    ),
    Endpoint(
        "DELETE", "/v1/file/delete", "file delete", _delete_file, needs=_FILE, statuses=_NOT_OPEN
    ),
    Endpoint(
        "POST", "/v1/file/rename", "file rename", _rename_file, needs=_MOVE, statuses=_NOT_OPEN
    ),
    Endpoint(
        "POST",
        "/v1/file/chmod",
        "file chmod",
        _chmod_file,
        needs=(*_FILE, "mode"),
        default_status=400,
        plain_refusals=True,
    ),
    Endpoint("POST", "/v1/file/share", "file share", _share_file, needs=(*_FILE, "destUser")),
    Endpoint(
        "GET",
        "/v1/file/receiveinfo",
        "file receive info",
        _receive_file_info,
        needs=("sharingRef",),
        in_query=True,
    ),
    Endpoint(
        "GET",
        "/v1/file/receive",
        "file receive",
        _receive_file,
        needs=("podName", "sharingRef", "dirPath"),
        in_query=True,
    ),
)
