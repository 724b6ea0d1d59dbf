"""The FairOS-DFS-compatible server: its texts, limits, quirks and sharing.

What is expected here was read from, or seen on, the real server.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from devnet_helpers import CONTROL_KEY, PASSWORD, Dfs, serving, with_pod

from cpodfs.devnet import dfs_model
from cpodfs.devnet.dfs_server import create_app
from cpodfs.devnet.faults import Faults

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_users(tmp_path: Path) -> None:
    async with serving(create_app(tmp_path, control_key=CONTROL_KEY)) as dfs:
        short = await dfs.post("/v2/user/signup", userName="ann", password="short")
        bad_name = await dfs.post("/v2/user/signup", userName="Ann", password=PASSWORD)
        await dfs.signup()
        again = await dfs.post("/v2/user/signup", userName="ann", password=PASSWORD)
        nobody = await dfs.post("/v2/user/login", userName="bob", password=PASSWORD)
        wrong = await dfs.post("/v2/user/login", userName="ann", password="wrong password")
        assert short == (
            500,
            {"message": "user signup: password should be at least 12 characters long"},
        )
        assert bad_name == (500, {"message": "user signup: invalid user name"})
        assert again == (400, {"message": "user signup: user name already present"})
        assert nobody == (404, {"message": "user login: no user available"})
        assert wrong == (400, {"message": "user login: invalid password"})
        assert await dfs.get("/v2/user/present", userName="ann") == (200, {"present": True})
        assert await dfs.get("/v1/user/isloggedin", userName="bob") == (200, {"loggedin": False})
        assert (await dfs.get("/v1/user/stat"))[1]["userName"] == "ann"
        assert (await dfs.post("/v1/user/logout"))[0] == 200
        assert await dfs.get("/v1/pod/ls") == (400, {"message": "ls pod: user not logged-in"})
        gone = await dfs.get("/v1/file/stat", podName="p", filePath="/f")
        assert gone == (500, {"message": "file stat: user not logged-in"})


async def test_sessions_by_token_and_cookie(tmp_path: Path) -> None:
    async with serving(create_app(tmp_path, control_key=CONTROL_KEY, token_lifetime_s=0.0)) as dfs:
        none = await dfs.get("/v1/pod/ls")
        text = "cookie: invalid cookie: http: named cookie not present"
        assert none == (401, {"message": text})
        body = {"userName": "ann", "password": PASSWORD}
        key = {"Authorization": f"Bearer {CONTROL_KEY}"}
        response = await dfs.client.post("/v2/user/signup", json=body, headers=key)
        cookie = response.cookies["fairOS-dfs"]
        assert cookie["secure"]
        token = (await response.json())["accessToken"]
        for bad in (token, "x", token[:-1], "Ünicode"):
            dfs.headers = {"Authorization": f"Bearer {bad}"}
            assert await dfs.get("/v1/pod/ls") == (401, {"message": "jwt: invalid token"})
        dfs.headers = {"Cookie": f"fairOS-dfs={cookie.value}"}
        assert (await dfs.get("/v1/pod/ls"))[0] == 200
        dfs.headers = {"Cookie": f"fairOS-dfs={cookie.value[:-2]}"}
        assert (await dfs.get("/v1/pod/ls"))[0] == 401


async def test_content_type_must_be_exact(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        for kind in ("application/json; charset=utf-8", "text/plain"):
            response = await dfs.client.post(
                "/v1/pod/new",
                data=b'{"podName": "q"}',
                headers=dfs.headers | {"Content-Type": kind},
            )
            assert response.status == 400
            assert await response.json() == {"message": "pod new: invalid request body type"}
        response = await dfs.client.post(
            "/v1/pod/new", data=b"{", headers=dfs.headers | {"Content-Type": "application/json"}
        )
        assert await response.json() == {"message": "pod new: could not decode arguments"}


async def test_pod_names(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        cases = {
            "p": (400, "pod new: pod already exists"),
            "x" * 65: (400, "pod new: pod name too long"),
            "é" * 33: (400, "pod new: pod name too long"),
            "": (400, 'pod new: "podName" argument missing'),
            " sp ": (400, "pod new: pod does not exist"),
            "x" * 64: (201, "pod created successfully"),
            "é" * 32: (201, "pod created successfully"),
        }
        for name, (status, text) in cases.items():
            assert await dfs.post("/v1/pod/new", podName=name) == (status, {"message": text})
        pods = (await dfs.get("/v1/pod/ls"))[1]["pods"]
        assert pods == ["p", "sp", "x" * 64, "é" * 32]
        assert await dfs.post("/v1/pod/open", podName="no") == (
            404,
            {"message": "pod open: pod does not exist"},
        )
        assert await dfs.post("/v1/pod/close", podName="sp") == (
            200,
            {"message": "pod closed successfully"},
        )
        assert await dfs.post("/v1/pod/close", podName="sp") == (
            500,
            {"message": "pod close: could not find pod: sp"},
        )
        assert (await dfs.delete("/v1/pod/delete", podName="sp"))[0] == 200
        assert await dfs.get("/v1/pod/present", podName="sp") == (200, {"present": False})


async def test_directories(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        mkdir = "/v1/dir/mkdir"
        for path, status in (("/d", 201), ("/d/e", 201), ("/" + "n" * 100, 201)):
            assert (await dfs.post(mkdir, podName="p", dirPath=path))[0] == status
        refused = {
            "/d": "mkdir: directory name already present",
            "/no/x": "mkdir: directory not present",
            "/d3/": "mkdir: directory not present",
            "/" + "n" * 101: "mkdir: too long directory name",
        }
        for path, text in refused.items():
            assert await dfs.post(mkdir, podName="p", dirPath=path) == (500, {"message": text})
        stat = (await dfs.get("/v1/dir/stat", podName="p", dirPath="/d"))[1]
        assert (stat["dirPath"], stat["dirName"], stat["mode"]) == ("/", "d", 0o040700)
        assert (stat["noOfDirectories"], stat["noOfFiles"]) == ("1", "0")
        assert abs(int(stat["creationTime"]) - time.time()) < 5
        assert await dfs.get("/v1/dir/ls", podName="p", dirPath="/no") == (
            404,
            {"message": "ls: directory not present"},
        )
        assert await dfs.get("/v1/dir/ls", podName="p", dirPath="/d/e") == (200, {})
        chmod = "/v1/dir/chmod"
        assert (await dfs.post(chmod, podName="p", dirPath="/d", mode="493"))[0] == 200
        stat = (await dfs.get("/v1/dir/stat", podName="p", dirPath="/d"))[1]
        assert stat["mode"] == 0o040755
        octal = await dfs.post(chmod, podName="p", dirPath="/d", mode="0o7")
        text = 'dir chmod: invalid mode: strconv.ParseUint: parsing "0o7": invalid syntax'
        assert octal == (400, {"message": text})


async def test_directory_rename_moves_everything_below(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        for path in ("/a", "/a/b", "/ab", "/z"):
            await dfs.post("/v1/dir/mkdir", podName="p", dirPath=path)
        await dfs.upload("/a/b", "f", b"deep")
        await dfs.upload("/ab", "f", b"neighbour")
        moved = await dfs.post("/v1/dir/rename", podName="p", oldPath="/a", newPath="/z/a2")
        assert moved == (200, {"message": "directory renamed successfully"})
        assert await dfs.names("/") == ({"ab", "z"}, set())
        assert await dfs.names("/z/a2") == ({"b"}, set())
        assert await dfs.download("/z/a2/b/f") == (200, b"deep")
        assert (await dfs.download("/a/b/f"))[0] == 404
        assert await dfs.download("/ab/f") == (200, b"neighbour")
        stat = (await dfs.get("/v1/file/stat", podName="p", filePath="/z/a2/b/f"))[1]
        assert stat["filePath"] == "/z/a2/b"


@pytest.mark.parametrize("bug", [True, False])
async def test_removing_a_nested_directory_edits_the_wrong_list(tmp_path: Path, bug: bool) -> None:
    async with with_pod(tmp_path, Faults(rmdir_bug=bug)) as dfs:
        for path in ("/a", "/a/b", "/b"):
            await dfs.post("/v1/dir/mkdir", podName="p", dirPath=path)
        assert (await dfs.delete("/v1/dir/rmdir", podName="p", dirPath="/a/b"))[0] == 200
        assert await dfs.names("/a") == (set(), set())
        assert await dfs.names("/") == ({"a"} if bug else {"a", "b"}, set())
        outer = await dfs.delete("/v1/dir/rmdir", podName="p", dirPath="/a")
        assert outer[0] == (500 if bug else 200)


async def test_files(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        content = bytes(range(256)) * 4096
        uploaded = await dfs.upload("/", "f", content)
        done = {"fileName": "f", "message": "uploaded successfully"}
        assert uploaded == (200, {"Responses": [done]})
        assert await dfs.download("/f") == (200, content)
        assert (await dfs.upload("/", "empty", b""))[0] == 200
        assert await dfs.download("/empty") == (200, b"")
        chmod = await dfs.post("/v1/file/chmod", podName="p", filePath="/f", mode="420")
        assert chmod[0] == 200
        stat = (await dfs.get("/v1/file/stat", podName="p", filePath="/f"))[1]
        assert (stat["fileSize"], stat["blockSize"]) == (str(len(content)), "1000000")
        assert (stat["filePath"], stat["mode"]) == ("/", 0o100644)
        assert stat["contentType"] == "application/octet-stream"
        await dfs.upload("/", "f", b"new")
        stat = (await dfs.get("/v1/file/stat", podName="p", filePath="/f"))[1]
        assert (stat["mode"], stat["contentType"]) == (0o100600, "")
        rename = "/v1/file/rename"
        taken = await dfs.post(rename, podName="p", oldPath="/f", newPath="/empty")
        assert taken == (500, {"message": "file rename: file already exist with new name"})
        moved = await dfs.post(rename, podName="p", oldPath="/f", newPath="/g")
        assert moved == (200, {"message": "file renamed successfully"})
        assert await dfs.names("/") == (set(), {"g", "empty"})
        deleted = await dfs.delete("/v1/file/delete", podName="p", filePath="/g")
        assert deleted == (200, {"message": "file deleted successfully"})
        text = "file delete: file not found in dfs"
        again = await dfs.delete("/v1/file/delete", podName="p", filePath="/g")
        assert again == (500, {"message": text})
        missing = await dfs.get("/v1/file/download", podName="p", filePath="/g")
        assert missing == (404, {"message": "download: file not found in dfs", "code": 404})


async def test_download_has_a_length_and_ignores_ranges(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.upload("/", "f", b"0123456789")
        url, query = "/v1/file/download", {"podName": "p", "filePath": "/f"}
        headers = dfs.headers | {"Range": "bytes=2-3"}
        async with dfs.client.get(url, params=query, headers=headers) as response:
            assert (response.status, response.content_length) == (200, 10)
            assert await response.read() == b"0123456789"


async def test_upload_arguments(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.upload("/", "f", b"old")
        bounds = "upload: block size must be between 1000000 - 8000000 (1Mb - 8Mb)"
        for block in ("999999", "8000001", "1Kb"):
            refused = await dfs.upload("/", "new", b"x", blockSize=block)
            assert refused == (500, {"message": f"file upload: {bounds}"})
        for block in ("1000000", "8Mb", "1 MiB"):
            assert (await dfs.upload("/", "f", b"x", blockSize=block))[0] == 200
        wrong = await dfs.upload("/", "f", b"x", blockSize="1parsec")
        assert wrong == (400, {"message": "file upload: unhandled size name: parsec"})
        wrong = await dfs.upload("/", "f", b"x", overwrite="maybe")
        assert wrong == (400, {"message": 'file upload: "overwrite" argument is wrong'})
        wrong = await dfs.upload("/", "f", b"x", pod="nope")
        assert wrong == (404, {"message": "file upload: pod does not exist"})
        assert (await dfs.upload("/", "f", b"second", overwrite="false"))[0] == 200
        files = (await dfs.names("/"))[1]
        assert len(files) == 2
        backup = next(name for name in files if name.endswith("_f"))
        assert await dfs.download(f"/{backup}") == (200, b"x")
        assert await dfs.download("/f") == (200, b"second")


async def test_upload_into_a_missing_directory_is_refused_and_done(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        refused = await dfs.upload("/no", "f", b"here all the same")
        assert refused == (500, {"message": "file upload: directory not present"})
        assert await dfs.download("/no/f") == (200, b"here all the same")


async def test_renames_over_what_no_list_names(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.post("/v1/dir/mkdir", podName="p", dirPath="/a")
        await dfs.upload("/a", "f", b"listed")
        await dfs.upload("/b", "f", b"an orphan")
        move = await dfs.post("/v1/dir/rename", podName="p", oldPath="/a", newPath="/b")
        assert move[0] == 200
        assert await dfs.download("/b/f") == (200, b"listed")
        text = "file rename: directory not present"
        move = await dfs.post("/v1/file/rename", podName="p", oldPath="/b/f", newPath="/no/f")
        assert move == (500, {"message": text})
        assert await dfs.names("/b") == (set(), set())
        assert await dfs.download("/no/f") == (200, b"listed")


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'filename="a b"', "a b"),
        (b'filename="q\\"uote"', 'q"uote'),
        (b'filename="back\\\\slash"', "back\\slash"),
        (b'filename="per%41cent"', "per%41cent"),
        (b'filename="semi;colon"', "semi;colon"),
        ('filename="umläut☃"'.encode(), "umläut☃"),
        (b'filename="sl/ash"', "ash"),
        (b"filename*=UTF-8''new%0Aline%22", 'new\nline"'),
        (b'filename="ctl\x01"', None),
    ],
)
async def test_file_names_in_forms(tmp_path: Path, raw: bytes, name: str | None) -> None:
    def part(about: bytes, content: bytes) -> bytes:
        return b"--B\r\nContent-Disposition: form-data; " + about + b"\r\n\r\n" + content + b"\r\n"

    async with with_pod(tmp_path) as dfs:
        body = part(b'name="podName"', b"p") + part(b'name="dirPath"', b"/")
        body += part(b'name="blockSize"', b"1Mb")
        body += part(b'name="files"; ' + raw, b"content") + b"--B--\r\n"
        headers = dfs.headers | {"Content-Type": "multipart/form-data; boundary=B"}
        response = await dfs.client.post("/v1/file/upload", data=body, headers=headers)
        if name is None:
            text = 'file upload: "podName" argument missing'
            assert (response.status, await response.json()) == (400, {"message": text})
        else:
            assert response.status == 200
            assert (await dfs.names("/"))[1] == {name}
            assert await dfs.download(f"/{name}") == (200, b"content")


async def test_where_the_real_server_panics_the_connection_ends(tmp_path: Path) -> None:
    from aiohttp import ClientError

    async with with_pod(tmp_path) as dfs:
        await dfs.upload("/", "f", b"x")
        for path in ("/f", "/index.dfs"):
            with pytest.raises(ClientError):
                await dfs.post("/v1/dir/mkdir", podName="p", dirPath=path)
        with pytest.raises(ClientError):
            await dfs.get("/v1/file/stat", podName="p", filePath="/f/")
        assert await dfs.names("/") == (set(), {"f"})


async def _share(dfs: Dfs) -> str:
    await dfs.post("/v1/dir/mkdir", podName="p", dirPath="/d")
    await dfs.upload("/d", "f", b"shared")
    reference = (await dfs.post("/v1/pod/share", podName="p"))[1]["podSharingReference"]
    assert len(reference) == 64
    return str(reference)


async def test_received_pods_are_read_only(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        reference = await _share(dfs)
        await dfs.signup("bob")
        info = (await dfs.get("/v1/pod/receiveinfo", sharingRef=reference))[1]
        assert set(info) == {"podName", "podAddress", "password", "userAddress"}
        received = await dfs.get("/v1/pod/receive", sharingRef=reference, sharedPodName="mine")
        assert received == (200, {"message": 'public pod "p", added as shared pod'})
        assert (await dfs.get("/v1/pod/ls"))[1] == {"pods": [], "sharedPods": ["p"]}
        assert await dfs.download("/d/f") == (200, b"shared")
        read_only = "read only feed"
        refusals = [
            (await dfs.upload("/d", "f", b"x"), 500, f"file upload: {read_only}"),
            (
                await dfs.post("/v1/dir/mkdir", podName="p", dirPath="/n"),
                500,
                f"mkdir: {read_only}",
            ),
            (
                await dfs.delete("/v1/file/delete", podName="p", filePath="/d/f"),
                500,
                "file delete: operation not permitted: read only pod",
            ),
            (
                await dfs.post("/v1/file/chmod", podName="p", filePath="/d/f", mode="420"),
                400,
                read_only,
            ),
            (
                await dfs.post("/v1/dir/rename", podName="p", oldPath="/d", newPath="/e"),
                500,
                f"rename-dir: {read_only}",
            ),
        ]
        for answer, status, text in refusals:
            assert answer == (status, {"message": text})
        assert await dfs.names("/d") == (set(), {"f"})
        unknown = await dfs.get("/v1/pod/receive", sharingRef="ab" * 32)
        assert unknown == (500, {"message": "pod receive: Not Found", "code": 500})


async def test_forks_are_copies(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        reference = await _share(dfs)
        assert (await dfs.post("/v1/pod/fork", podName="p", forkName="q"))[0] == 200
        fork = await dfs.post(
            "/v1/pod/fork-from-reference", forkName="r", podSharingReference=reference
        )
        assert fork == (200, {"message": "pod forked successfully"})
        await dfs.upload("/d", "f", b"changed")
        await dfs.delete("/v1/pod/delete", podName="p")
        assert await dfs.download("/d/f", pod="q") == (200, b"shared")
        assert await dfs.download("/d/f", pod="r") == (200, b"shared")
        assert (await dfs.post("/v1/pod/fork", podName="q", forkName="r"))[0] == 500


async def test_public_endpoints_need_no_login(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        reference = await _share(dfs)
        dfs.headers = {}
        async with dfs.client.get(f"/public/{reference}/d/f") as response:
            assert await response.read() == b"shared"
        query = {"sharingRef": reference, "filePath": "/d/f"}
        async with dfs.client.get("/public-file", params=query) as response:
            assert await response.read() == b"shared"
        listing = (await dfs.get("/public-dir", sharingRef=reference, dirPath="/"))[1]
        assert [entry["name"] for entry in listing["dirs"]] == ["d"]
        shot = (await dfs.get("/public-pod-snapshot", sharingRef=reference))[1]
        assert shot["dirList"][0]["fileList"][0]["fileName"] == "f"


async def test_shared_files(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.upload("/", "f", b"for bob")
        share = await dfs.post("/v1/file/share", podName="p", filePath="/f", destUser="bob")
        reference = share[1]["fileSharingReference"]
        await dfs.delete("/v1/file/delete", podName="p", filePath="/f")
        await dfs.signup("bob")
        await dfs.post("/v1/pod/new", podName="p")
        info = (await dfs.get("/v1/file/receiveinfo", sharingRef=reference))[1]
        assert (info["name"], info["size"], info["destAddress"]) == ("f", "7", "bob")
        query = {"podName": "p", "sharingRef": reference, "dirPath": "/"}
        assert await dfs.get("/v1/file/receive", **query) == (200, {"fileName": "/f"})
        assert await dfs.download("/f") == (200, b"for bob")


async def test_closed_pods_with_strict_open(tmp_path: Path) -> None:
    async with with_pod(tmp_path, strict_open=True) as dfs:
        assert await dfs.names("/") == (set(), set())
        await dfs.post("/v1/pod/close", podName="p")
        ls = await dfs.get("/v1/dir/ls", podName="p", dirPath="/")
        assert ls == (400, {"message": "ls: pod not open"})
        assert await dfs.upload("/", "f", b"") == (400, {"message": "file upload: pod not open"})
        assert (await dfs.post("/v1/pod/open", podName="p"))[0] == 200
        assert await dfs.names("/") == (set(), set())


async def test_text_that_is_not_unicode_does_no_harm(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        headers = dfs.headers | {"Content-Type": "application/json"}
        for body in (
            b'{"podName": "p", "dirPath": "/\\ud800"}',
            b'{"podName":"p","dirPath":"/\xff"}',
        ):
            response = await dfs.client.post("/v1/dir/mkdir", data=body, headers=headers)
            assert response.status in (201, 500)
        assert await dfs.names("/") == ({"\ufffd"}, set())


async def test_wrong_method_and_unknown_path(tmp_path: Path) -> None:
    async with serving(create_app(tmp_path, control_key=CONTROL_KEY)) as dfs:
        assert await dfs.get("/v1/pod/new") == (404, "404 page not found\n")
        assert await dfs.get("/v1/nonsense") == (404, "404 page not found\n")


@pytest.mark.parametrize(
    ("path", "parent", "base"),
    [
        ("/a/b", "/a", "b"),
        ("/a/", "/a", "a"),
        ("/", "/", "/"),
        ("a", ".", "a"),
        ("//a//b", "/a", "b"),
        ("/d/../up", "/", "up"),
        ("", ".", "."),
    ],
)
def test_path_arithmetic(path: str, parent: str, base: str) -> None:
    assert (dfs_model.parent_of(path), dfs_model.base_of(path)) == (parent, base)
