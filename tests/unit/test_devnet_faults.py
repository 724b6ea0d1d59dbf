"""Faults on purpose, and the record of what was asked."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientPayloadError
from devnet_helpers import PASSWORD, Dfs, with_pod

from cpodfs.devnet.faults import Faults, plan

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _outcomes(dfs: Dfs, count: int) -> list[int | str]:
    found: list[int | str] = []
    for n in range(count):
        try:
            found.append((await dfs.post("/v1/dir/mkdir", podName="p", dirPath=f"/d{n}"))[0])
        except ClientError:
            found.append("dropped")
    return found


async def test_the_same_seed_gives_the_same_faults(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        async with with_pod(tmp_path / name) as dfs:
            await dfs.faults(seed=7, error_rate=0.3, drop_rate=0.3, status=429, match="mkdir")
            runs.append((await _outcomes(dfs, 30), await dfs.names("/")))
    assert runs[0] == runs[1]
    outcomes, (made, _) = runs[0]
    assert {201, 429, "dropped"} == set(outcomes)
    dropped = {f"d{n}" for n, outcome in enumerate(outcomes) if outcome == "dropped"}
    assert dropped & made, "some must be dropped after the work"
    assert dropped - made, "some must be dropped before it"
    assert made == {f"d{n}" for n, outcome in enumerate(outcomes) if outcome == 201} | (
        dropped & made
    )


def test_the_plan_depends_on_seed_and_number_only() -> None:
    faults = Faults(drop_rate=0.5, latency_jitter_s=1.0)
    fates = [plan(faults, 3, n) for n in range(50)]
    assert fates == [plan(faults, 3, n) for n in range(50)]
    assert fates != [plan(faults, 4, n) for n in range(50)]
    assert {fate.outcome for fate in fates} == {"pass", "drop-before", "drop-after"}


async def test_faults_can_be_shown_changed_and_refused(tmp_path: Path) -> None:
    async with with_pod(tmp_path, Faults(latency_s=0.001)) as dfs:
        assert (await dfs.get("/devnet/faults"))[1]["latency_s"] == 0.001
        await dfs.faults(seed=1)
        shown = (await dfs.get("/devnet/faults"))[1]
        assert (shown["latency_s"], shown["seed"]) == (0.0, 1)
        for wrong in ({"error_rate": 2}, {"no_such": 1}, {"match": "("}):
            assert (await dfs.post("/devnet/faults", **wrong))[0] == 400


async def test_truncated_downloads(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.upload("/", "f", b"x" * 500_000)
        await dfs.faults(truncate_rate=1.0)
        with pytest.raises(ClientPayloadError):
            await dfs.download("/f")
        await dfs.faults()
        assert (await dfs.download("/f"))[1] == b"x" * 500_000


async def test_expired_sessions(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.faults(expire_every=3, seed=2)
        answers = []
        for _ in range(24):
            status, body = await dfs.get("/v1/pod/ls")
            answers.append((status, body.get("message")))
            if status != 200:
                await dfs.login()
        assert (401, "jwt: invalid token") in answers
        assert (400, "ls pod: user not logged-in") in answers
        assert [status == 200 for status, _ in answers] == [True, True, False] * 8


async def test_bandwidth_limits_both_directions(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        content = b"x" * 400_000
        await dfs.faults(bandwidth=2_000_000)
        started = time.monotonic()
        await dfs.upload("/", "f", content)
        up = time.monotonic()
        await dfs.download("/f")
        assert up - started >= 0.19
        assert time.monotonic() - up >= 0.19


@pytest.mark.parametrize("race", [True, False])
async def test_directory_race(tmp_path: Path, race: bool) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.faults(directory_race=race)
        uploads = [dfs.upload("/", f"f{n}", b"x") for n in range(8)]
        assert {status for status, _ in await asyncio.gather(*uploads)} == {200}
        listed = (await dfs.names("/"))[1]
        assert (len(listed) < 8) is race
        assert (await dfs.download("/f3"))[0] == 200


async def test_renaming_what_was_not_listed(tmp_path: Path) -> None:
    async with with_pod(tmp_path, Faults(rename_needs_listing=True)) as dfs:
        for path in ("/a", "/a/b", "/a/b/c"):
            await dfs.post("/v1/dir/mkdir", podName="p", dirPath=path)
        await dfs.post("/v1/pod/close", podName="p")
        await dfs.names("/a")
        move = {"podName": "p", "oldPath": "/a", "newPath": "/z"}
        with pytest.raises(ClientError):
            await dfs.post("/v1/dir/rename", **move)
        await dfs.names("/a/b")
        assert (await dfs.post("/v1/dir/rename", **move))[0] == 200


async def test_requests_are_counted_and_logged(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    async with with_pod(tmp_path / "state", request_log=log) as dfs:
        await dfs.post("/devnet/stats/reset")
        await dfs.upload("/", "f", b"x" * 1000)
        await dfs.download("/f")
        await dfs.get("/v1/file/stat", podName="p", filePath="/no")
        stats = (await dfs.get("/devnet/stats"))[1]
        assert stats["requests"] == 3
        assert stats["statuses"] == {"200": 2, "500": 1}
        upload = stats["endpoints"]["POST /v1/file/upload"]
        assert (upload["count"], upload["bytes_in"]) == (1, 1000)
        assert stats["endpoints"]["GET /v1/file/download"]["bytes_out"] == 1000
        assert stats["endpoints"]["GET /v1/file/stat"]["errors"] == 1
    assert log.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    wanted = {
        "method": "POST",
        "path": "/v1/file/upload",
        "pod": "p",
        "target": "/f",
        "status": 200,
    }
    assert wanted.items() <= lines[-3].items()
    assert "accessToken" not in log.read_text()
    assert lines[-3]["concurrency"] == 1


async def test_swarm_has_a_file_later_than_the_server(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.faults(swarm_delay_s=3600)
        await dfs.upload("/", "f", b"x" * 9_000_000)
        where = {"podName": "p", "filePath": "/f"}
        status, some = await dfs.get("/v1/file/status", **where)
        assert (status, some["synced"]) == (200, 0)
        assert some["processed"] == some["total"] > 9_000_000 // 4096
        await dfs.faults(swarm_delay_s=3600, status_has_total=False)
        nothing = {"total": 0, "processed": 0, "synced": 0}
        assert (await dfs.get("/v1/file/status", **where))[1] == nothing
        await dfs.faults()
        every = some | {"synced": some["total"]}
        assert (await dfs.get("/v1/file/status", **where))[1] == every
        await dfs.post("/v1/pod/close", podName="p")
        gone = {"message": "status: file status is not available", "code": 500}
        assert await dfs.get("/v1/file/status", **where) == (500, gone)


async def test_what_goes_with_an_overload(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        for asked in ("7", "", "Wed, 21 Oct 2015 07:28:00 GMT"):
            await dfs.faults(error_rate=1, status=503, retry_after=asked, match="/v1/pod/ls")
            async with dfs.client.get("/v1/pod/ls", headers=dfs.headers) as response:
                assert response.status == 503
                assert response.headers.get("Retry-After", "") == asked
        assert (await dfs.post("/devnet/faults", retry_after="1\r\nX: y"))[0] == 400


async def test_logins_are_refused_for_a_while(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        login = {"userName": "ann", "password": PASSWORD}
        await dfs.faults(refuse_logins=2)
        answers = [(await dfs.post("/v2/user/login", **login))[0] for _ in range(4)]
        assert answers == [401, 401, 200, 200]
        await dfs.faults(refuse_logins=1, login_status=429, retry_after="9")
        async with dfs.client.post("/v2/user/login", json=login) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "9")


async def test_tokens_that_no_call_accepts(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        await dfs.faults(reject_tokens=True)
        tokens = set()
        for _ in range(3):
            await dfs.login()
            tokens.add(dfs.headers["Authorization"])
            assert await dfs.get("/v1/pod/ls") == (401, {"message": "jwt: invalid token"})
        assert len(tokens) == 1
