"""The endpoints that move content: upload, download, and what is public without a login.

Imports the devnet's own modules. Content streams between socket and disk in chunks, so memory does
not grow with file size. There is no Range: a download is the whole file, as at the real server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import BadHttpMessage

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_account import share_of
from cpodfs.devnet.dfs_files import changing
from cpodfs.devnet.dfs_model import Refusal
from cpodfs.devnet.dfs_reads import Reads
from cpodfs.devnet.dfs_record import Content, File
from cpodfs.devnet.dfs_routes import Call, Endpoint, Reply, Server, message
from cpodfs.devnet.dfs_store import Store
from cpodfs.devnet.dfs_tree import Tree
from cpodfs.devnet.faults import NOTE, FaultBox

_CHUNK = 1 << 18
_FIELD_MAX = 1 << 16
_COMPRESSIONS = ("", "gzip", "snappy")
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


@dataclass
class _Part:
    """One uploaded file on disk, not yet named by anything. ``content_type`` is guessed."""

    name: str
    temp: Path
    size: int = 0
    head: bytes = b""

    def content(self, store: Store) -> Content:
        kind = m.sniff(self.head[:512]) if self.size >= 512 else ""
        return Content(store.adopt(self.temp) if self.size else "", self.size, kind)


@dataclass
class _Form:
    """A multipart form: text fields and ``files`` parts, in whatever order they came."""

    fields: dict[str, str] = field(default_factory=dict)
    parts: list[_Part] = field(default_factory=list)

    def discard(self) -> None:
        for part in self.parts:
            part.temp.unlink(missing_ok=True)


async def _read_form(request: web.Request, server: Server, file_field: str) -> _Form:
    form = _Form(fields=dict(request.query))
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise Refusal("nested multipart")
            about = m.disposition(part.headers.get("Content-Disposition", ""))
            if about.get("name") == file_field and about.get("filename"):
                received = _Part(m.base_of(about["filename"]), server.store.temp_path())
                form.parts.append(received)
                await _receive(part, received, request, server.box)
            elif "name" in about:
                value = await part.read_chunk(_FIELD_MAX)
                form.fields[about["name"]] = m.printable(value.decode("utf-8", "surrogateescape"))
                while await part.read_chunk(_CHUNK):
                    pass
    except BaseException:
        form.discard()
        raise
    return form


async def _receive(
    part: BodyPartReader, received: _Part, request: web.Request, box: FaultBox
) -> None:
    note = request[NOTE]
    with _created(received.temp) as file:
        while chunk := await part.read_chunk(_CHUNK):
            if received.size < 512:
                received.head += chunk[:512]
            received.size += len(chunk)
            note.bytes_in = (note.bytes_in or 0) + len(chunk)
            file.write(chunk)
            await box.up.wait(len(chunk), box.faults.bandwidth)


@contextlib.contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    with path.open("xb", buffering=0) as file:
        yield file


async def _upload(call: Call) -> Reply:
    request, server = call.request, call.server
    if not request.content_type.startswith("multipart/"):
        return message("file upload: request Content-Type isn't multipart/form-data", 400)
    try:
        form = await _read_form(request, server, "files")
    except (ValueError, BadHttpMessage):  # the real server then finds no field at all
        return message('file upload: "podName" argument missing', 400)
    try:
        return await _store_form(call, form)
    finally:
        form.discard()


async def _store_form(call: Call, form: _Form) -> Reply:
    fields, request = form.fields, call.request
    for name in ("podName", "dirPath", "blockSize"):
        if not fields.get(name):
            return message(f'file upload: "{name}" argument missing', 400)
    pod_name, path = fields["podName"], fields["dirPath"]
    request[NOTE].pod = pod_name
    request[NOTE].target = m.join(path, form.parts[0].name) if form.parts else path
    compression = request.headers.get("fairOS-dfs-Compression", "")
    if compression not in _COMPRESSIONS:
        return message('file upload: invalid value for "compression" header', 400)
    overwrite = fields.get("overwrite") or "true"
    if overwrite not in _TRUE + _FALSE:
        return message('file upload: "overwrite" argument is wrong', 400)
    try:
        block = m.parse_size(fields["blockSize"])
    except Refusal as refusal:
        return message(f"file upload: {refusal}", 400)
    if not form.parts:
        return message('file upload: parameter "files" missing', 400)
    done = []
    for part in form.parts:
        await _store_part(call, part, pod_name, path, block, compression, overwrite in _TRUE)
        done.append({"fileName": part.name, "message": "uploaded successfully"})
    return {"Responses": done}


async def _store_part(
    call: Call, part: _Part, pod_name: str, path: str, block: int, packing: str, overwrite: bool
) -> None:
    session, store = call.session, call.server.store
    pod = call.server.pod_in_use(session, pod_name)
    tree = call.server.tree(pod, session)
    if part.name == m.INDEX_NAME:
        _write_own_index(tree, path, part)
    content = part.content(store)

    def put() -> None:
        tree.put_file(
            path, part.name, content, block=block, compression=packing, overwrite=overwrite
        )

    try:
        await changing(call, tree, {path}, put)
    finally:
        with store.change():
            store.release(content.blob)
    session.tagged[pod.address, m.join(path, part.name)] = time.monotonic()


def _write_own_index(tree: Tree, path: str, part: _Part) -> None:
    """The server at once rewrites the file, which is its directory's, with the directory's list."""
    part.head = tree.index_json(path, adding=part.name)
    part.temp.write_bytes(part.head)
    part.size = len(part.head)


async def _update(call: Call) -> Reply:
    request, server = call.request, call.server
    if not request.content_type.startswith("multipart/"):
        return message("file update: request Content-Type isn't multipart/form-data", 400)
    try:
        form = await _read_form(request, server, "file")
    except (ValueError, BadHttpMessage):
        return message('file update: "podName" argument missing', 400)
    try:
        return _write_at(call, form)
    finally:
        form.discard()


def _write_at(call: Call, form: _Form) -> Reply:
    fields = form.fields
    for name in ("podName", "filePath"):
        if not fields.get(name):
            return message(f'file update: "{name}" argument missing', 400)
    note = call.request[NOTE]
    note.pod, note.target = fields["podName"], fields["filePath"]
    if not fields.get("offset", "").isdecimal():
        return message('file update: "offset" argument missing or wrong', 400)
    if not form.parts:
        return message('file update: parameter "file" missing', 400)
    session = call.session
    tree = call.server.tree(call.server.pod_in_use(session, fields["podName"]), session)
    path, offset = fields["filePath"], int(fields["offset"])
    found = tree.file(path)
    if found is None:
        raise Refusal("file not present")
    if offset > found.size:
        raise Refusal("wrong offset")
    tree.replace_content(path, _patched(call.server.store, found, form.parts[0], offset))
    done = {"fileName": path, "message": "updated successfully"}
    return {"Responses": [done]}


def _patched(store: Store, old: File, part: _Part, offset: int) -> Content:
    """The old content with the part written over it from ``offset`` on."""
    temp = store.temp_path()
    size = max(old.size, offset + part.size)
    with _created(temp) as target:
        if old.blob:
            with store.blob_path(old.blob).open("rb") as source:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
        target.seek(offset)
        with part.temp.open("rb") as source:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
    blob = store.adopt(temp)
    return Content(blob, size, old.content_type)


async def _download(call: Call) -> Reply:
    request, args = call.request, dict(call.args)
    if request.method == "POST":
        given = await request.post()
        args |= {key: value for key, value in given.items() if isinstance(value, str)}
        for name in ("podName", "filePath"):
            if not args.get(name):
                return message(f'download: "{name}" argument missing', 400)
    session, path = call.session, args["filePath"]
    pod = call.server.pod_in_use(session, args["podName"])
    found = call.server.tree(pod, session).need_file(path)
    request[NOTE].pod, request[NOTE].target = args["podName"], path
    reads = Reads(call.server.box, session, pod)
    if not reads.block(path, -1):
        raise Refusal("Not Found")
    blocks = -(-found.size // found.block_size)
    whole = next((n for n in range(blocks) if not reads.block(path, n)), blocks)
    if whole == 0 and blocks:
        return await _broken_before_its_start(request, found.size)
    if whole < blocks:
        share = whole * found.block_size / found.size
        request[NOTE].plan = replace(request[NOTE].plan, truncate_at=share)
    return await send_file(request, call.server, found)


async def _broken_before_its_start(request: web.Request, size: int) -> web.StreamResponse:
    """An error that was found when the length of the content was announced already."""
    text = b'{"message":"download: Not Found","code":500}\n\n'
    response = web.StreamResponse(status=500)
    response.content_type, response.charset = "application/json", "utf-8"
    response.content_length = size
    await response.prepare(request)
    await response.write(text[:size])
    if size > len(text) and request.transport is not None:
        request.transport.close()
    return response


async def send_file(request: web.Request, server: Server, found: File) -> web.StreamResponse:
    """Stream the whole content; a planned truncation ends the connection before its end."""
    note = request[NOTE]
    if note.silent:
        return web.Response()
    if not found.blob:
        return web.Response()
    with server.store.blob_path(found.blob).open("rb") as file:
        chunk = file.read(_CHUNK)
        response = web.StreamResponse(headers={"Content-Type": m.sniff(chunk[:512])})
        response.content_length = found.size
        await response.prepare(request)
        left = _bytes_to_send(request, found.size)
        while chunk and left > 0:
            await server.box.down.wait(min(len(chunk), left), server.box.faults.bandwidth)
            await response.write(chunk[:left])
            left -= len(chunk)
            note.bytes_out += len(chunk)
            chunk = file.read(_CHUNK)
    if note.plan.truncate_at is not None and request.transport is not None:
        note.bytes_out = _bytes_to_send(request, found.size)
        request.transport.close()
    else:
        await response.write_eof()
    return response


def _bytes_to_send(request: web.Request, size: int) -> int:
    share = request[NOTE].plan.truncate_at
    return size if share is None else int(size * share)


def _public_tree(call: Call) -> Tree:
    return Tree(call.server.store, share_of(call)["podAddress"], writable=False)


async def _public_file(call: Call) -> Reply:
    found = _public_tree(call).file(call.args["filePath"])
    if found is None:
        raise Refusal("feed does not exist or was not updated yet")
    return await send_file(call.request, call.server, found)


async def _public_path(call: Call) -> Reply:
    info = call.request.match_info
    args = {"sharingRef": info["ref"], "filePath": "/" + (info["file"] or "index.html")}
    return await _public_file(Call(call.request, call.server, "", args))


async def _public_dir(call: Call) -> Reply:
    tree, path = _public_tree(call), call.args["dirPath"]
    if not tree.has_dir(path):
        raise Refusal("list dir : feed does not exist or was not updated yet")
    dirs, files = tree.ls(path)
    return ({"dirs": dirs} if dirs else {}) | ({"files": files} if files else {})


async def _public_snapshot(call: Call) -> Reply:
    return _public_tree(call).snapshot(call.args["path"] or "/")


_PUBLIC = "public pod file download"
_DOWNLOAD = {m.POD_NOT_OPEN: 400, m.FILE_NOT_FOUND: 404}
_UPLOAD = {m.POD_NOT_FOUND: 404, m.POD_NOT_OPEN: 400}

ENDPOINTS = (
    Endpoint("POST", "/v1/file/upload", "file upload", _upload, statuses=_UPLOAD, in_query=True),
    Endpoint(
        "POST",
        "/v1/file/update",
        "file update: writeAt failed",
        _update,
        default_status=400,
        in_query=True,
    ),
    Endpoint(
        "GET",
        "/v1/file/download",
        "download",
        _download,
        needs=("podName", "filePath"),
        statuses=_DOWNLOAD,
        bare="work",
        in_query=True,
    ),
    Endpoint(
        "POST",
        "/v1/file/download",
        "download",
        _download,
        takes=("podName", "filePath"),
        statuses=_DOWNLOAD,
        bare="work",
        in_query=True,
    ),
    Endpoint(
        "GET",
        "/public-file",
        _PUBLIC,
        _public_file,
        needs=("sharingRef", "filePath"),
        bare="all",
        in_query=True,
        public=True,
    ),
    Endpoint(
        "GET",
        "/public-dir",
        _PUBLIC,
        _public_dir,
        needs=("sharingRef", "dirPath"),
        bare="all",
        in_query=True,
        public=True,
    ),
    Endpoint(
        "GET",
        "/public/{ref}/{file:.*}",
        _PUBLIC,
        _public_path,
        bare="all",
        in_query=True,
        public=True,
    ),
    Endpoint(
        "GET",
        "/public-pod-snapshot",
        "pod receive snapshot",
        _public_snapshot,
        needs=("sharingRef",),
        takes=("path",),
        bare="all",
        in_query=True,
        public=True,
    ),
)
