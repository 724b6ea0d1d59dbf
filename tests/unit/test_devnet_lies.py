"""The server's lies: it says "not there" of what it cannot read just now. The answers are the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientPayloadError
from devnet_helpers import CONTROL_KEY, Dfs, serving, with_pod

from cpodfs.devnet.dfs_server import create_app
from cpodfs.devnet.faults import Faults

pytestmark = pytest.mark.anyio

NO_PODS = {"pods": [], "sharedPods": []}
NO_FILE = {"message": "file stat: file not found in dfs"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _stat(dfs: Dfs, path: str, pod: str = "p") -> tuple[int, Any]:
    return await dfs.get("/v1/file/stat", podName=pod, filePath=path)


async def _ls(dfs: Dfs, path: str, pod: str = "p") -> tuple[int, Any]:
    return await dfs.get("/v1/dir/ls", podName=pod, dirPath=path)


async def _reopen(dfs: Dfs, pod: str = "p") -> tuple[int, Any]:
    await dfs.post("/v1/pod/close", podName=pod)
    return await dfs.post("/v1/pod/open", podName=pod)


async def _fill(dfs: Dfs) -> None:
    await dfs.post("/v1/dir/mkdir", podName="p", dirPath="/d")
    for n in range(10):
        await dfs.upload("/d", f"f{n}", b"x" * 500)


async def test_with_all_reads_failing_nothing_is_there(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        await dfs.post("/v1/pod/close", podName="p")
        await dfs.faults(read_failure_rate=1.0)
        assert await dfs.get("/v1/pod/ls") == (200, NO_PODS)
        gone = {"message": "pod open: pod does not exist"}
        assert await dfs.post("/v1/pod/open", podName="p") == (404, gone)
        gone = {"message": "file stat: pod does not exist"}
        assert await _stat(dfs, "/d/f1") == (500, gone)
        assert (await dfs.get("/v1/pod/present", podName="p"))[1] == {"present": False}
        await dfs.faults()
        assert (await dfs.get("/v1/pod/ls"))[1]["pods"] == ["p"]
        assert len((await dfs.names("/d"))[1]) == 10


async def test_an_open_pod_answers_from_memory_until_it_is_closed(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        await _reopen(dfs)
        assert (await _stat(dfs, "/d/f1"))[0] == 200
        await dfs.faults(read_failure_rate=1.0)
        assert (await _stat(dfs, "/d/f1"))[0] == 200
        assert await _stat(dfs, "/d/f2") == (500, NO_FILE)
        status, body = await dfs.get("/v1/file/download", podName="p", filePath="/d/f2")
        assert (status, body) == (404, {"message": "download: file not found in dfs", "code": 404})
        assert await _ls(dfs, "/d") == (200, {}), "the metadata of files is fetched every time"
        gone = {"message": "ls: directory not present"}
        await dfs.post("/v1/pod/close", podName="p")
        await dfs.faults()
        await dfs.post("/v1/pod/open", podName="p")
        await dfs.faults(read_failure_rate=1.0)
        assert await _ls(dfs, "/d") == (404, gone)


async def test_listings_lack_what_could_not_be_read_and_the_seed_decides(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        async with with_pod(tmp_path / name) as dfs:
            await _fill(dfs)
            await dfs.faults(read_failure_rate=0.4, seed=5)
            seen = [(await dfs.names("/d"))[1] for _ in range(4)]
            seen.append({str(await dfs.get("/v1/pod/ls")) for _ in range(8)})
            runs.append(seen)
    assert runs[0] == runs[1]
    assert len({frozenset(names) for names in runs[0][:4]}) > 1
    assert all(0 < len(names) < 10 for names in runs[0][:4])
    assert len(runs[0][4]) == 2


async def test_content_that_cannot_be_read(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.upload("/", "f", b"x" * 5_000_000)
        await dfs.faults(read_failure_rate=1.0)
        status, body = await dfs.get("/v1/file/download", podName="p", filePath="/f")
        assert (status, body) == (500, {"message": "download: Not Found", "code": 500})
        kinds = set()
        for seed in range(40):
            await dfs.faults(read_failure_rate=0.3, seed=seed)
            try:
                kinds.add((await dfs.download("/f"))[0])
            except ClientPayloadError:
                kinds.add(0)
        assert kinds == {200, 500, 0}


async def test_an_empty_list_of_pods(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        await dfs.faults(pods_empty=True)
        assert await dfs.get("/v1/pod/ls") == (200, NO_PODS)
        assert (await _stat(dfs, "/d/f1"))[0] == 200, "the pod is open"
        assert (await _reopen(dfs))[0] == 404
        await dfs.faults()
        assert (await _reopen(dfs))[0] == 200


async def test_a_list_that_was_not_read_may_be_stored_anew(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.faults(pods_empty=True)
        assert (await dfs.get("/v1/pod/ls"))[1] == NO_PODS
        await dfs.faults(pods_empty=True, wipe_pods=True)
        await dfs.get("/v1/pod/ls")
        await dfs.faults()
        assert (await dfs.get("/v1/pod/ls"))[1]["pods"] == ["p"], "looking alone stores nothing"
        await dfs.faults(pods_empty=True, wipe_pods=True)
        await dfs.post("/v1/pod/new", podName="q")
        await dfs.faults()
        assert (await dfs.get("/v1/pod/ls"))[1]["pods"] == ["q"]


async def test_one_name_is_not_there_until_told_otherwise(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        await dfs.post("/v1/pod/new", podName="q")
        await dfs.faults(not_there=["p/d/f1"])
        assert await _stat(dfs, "/d/f1") == (500, NO_FILE)
        assert (await dfs.download("/d/f1"))[0] == 404
        assert (await dfs.names("/d"))[1] == {f"f{n}" for n in range(10)} - {"f1"}
        await dfs.faults(not_there=["p/d"])
        assert (await _ls(dfs, "/d"))[0] == 404
        assert await dfs.names("/") == (set(), set())
        assert (await _stat(dfs, "/d/f2"))[0] == 500
        await dfs.faults(not_there=["p"])
        assert (await dfs.get("/v1/pod/ls"))[1]["pods"] == ["q"]
        assert await _ls(dfs, "/d") == (500, {"message": "ls: pod does not exist"})
        await dfs.faults()
        assert len((await dfs.names("/d"))[1]) == 10


async def test_a_directory_made_over_one_that_was_not_seen_is_empty(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        await dfs.faults(not_there=["p/d"])
        assert (await dfs.post("/v1/dir/mkdir", podName="p", dirPath="/d"))[0] == 201
        await dfs.faults()
        assert await dfs.names("/d") == (set(), set())


async def test_an_empty_store_keeps_the_accounts_only(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        await dfs.faults(empty_store=True)
        assert (await dfs.get("/v1/pod/ls"))[0] == 401, "as after a restart"
        await dfs.login()
        assert await dfs.get("/v1/pod/ls") == (200, NO_PODS)
        await dfs.post("/v1/pod/new", podName="other")
        await dfs.faults()
        assert (await dfs.get("/v1/pod/ls"))[0] == 401
        await dfs.login()
        assert (await dfs.get("/v1/pod/ls"))[1]["pods"] == ["p"]
        assert (await dfs.download("/d/f3"))[1] == b"x" * 500
    async with serving(
        create_app(tmp_path, Faults(empty_store=True), control_key=CONTROL_KEY)
    ) as dfs:
        await dfs.login()
        assert await dfs.get("/v1/pod/ls") == (200, NO_PODS)


async def _stale_names(dfs: Dfs) -> set[str]:
    """What a listing shows that was read from an older version of the directory."""
    for seed in range(200):
        await dfs.faults()
        await _reopen(dfs)
        await dfs.faults(read_failure_rate=0.3, seed=seed)
        if (await _ls(dfs, "/d"))[0] != 200:
            continue
        await dfs.faults()
        _, seen = await dfs.names("/d")
        if 0 < len(seen) < 10:
            return seen
    raise AssertionError


async def test_an_older_list_may_be_shown_and_stays_until_the_pod_is_closed(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        seen = await _stale_names(dfs)
        assert seen == {f"f{n}" for n in range(len(seen))}, "what was added last is missing"
        assert await _stat(dfs, "/d/f9") == (500, NO_FILE)
        await _reopen(dfs)
        assert len((await dfs.names("/d"))[1]) == 10


@pytest.mark.parametrize("lossy", [True, False])
async def test_a_change_of_an_older_list_may_lose_what_it_lacks(
    tmp_path: Path, lossy: bool
) -> None:
    async with with_pod(tmp_path) as dfs:
        await _fill(dfs)
        seen = await _stale_names(dfs)
        await dfs.faults(stale_writes=lossy)
        assert (await dfs.upload("/d", "new", b"x"))[0] == 200
        await _reopen(dfs)
        everything = {f"f{n}" for n in range(10)}
        assert (await dfs.names("/d"))[1] == (seen if lossy else everything) | {"new"}
        assert (await dfs.download("/d/f9"))[1] == b"x" * 500


async def test_an_older_list_of_pods(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        for name in "qrs":
            await dfs.post("/v1/pod/new", podName=name)
        await dfs.faults(read_failure_rate=0.3, seed=1)
        shown = {tuple((await dfs.get("/v1/pod/ls"))[1]["pods"]) for _ in range(40)}
        assert {(), ("p", "q", "r"), ("p", "q", "r", "s")} <= shown


async def test_an_older_version_of_a_file_may_be_shown(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        for size in (100, 200, 300):
            await dfs.upload("/", "f", b"x" * size)
        seen = set()
        for seed in range(40):
            await dfs.faults()
            await _reopen(dfs)
            await dfs.faults(read_failure_rate=0.3, seed=seed)
            status, body = await _stat(dfs, "/f")
            size = int(body["fileSize"]) if status == 200 else 0
            await dfs.faults()
            if size:
                assert len((await dfs.download("/f"))[1]) == size, "it stays in memory"
            seen.add(size)
        assert seen == {0, 100, 200, 300}
        await _reopen(dfs)
        assert (await dfs.download("/f"))[1] == b"x" * 300
        await dfs.faults(read_failure_rate=0.3, seed=1)
        listed = {
            str((await _ls(dfs, "/"))[1].get("files", [{}])[0].get("size")) for _ in range(40)
        }
        assert {"100", "200", "300"} <= listed
