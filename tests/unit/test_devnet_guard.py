"""Who may speak to the development servers, and who may control them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from devnet_helpers import CONTROL_KEY, PASSWORD, with_pod
from market_tools import APP_KEY, served
from market_tools import CONTROL_KEY as MARKET_CONTROL_KEY

from cpodfs.devnet import launch

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
KEY = {"Authorization": f"Bearer {CONTROL_KEY}"}
DFS_CONTROLS = (
    ("POST", "/devnet/faults"),
    ("GET", "/devnet/faults"),
    ("GET", "/devnet/stats"),
    ("POST", "/devnet/stats/reset"),
    ("POST", "/v2/user/signup"),
)
MARKET_CONTROLS = (
    ("GET", "/devnet/misbehave"),
    ("POST", "/devnet/misbehave"),
    ("POST", "/devnet/vanish"),
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_controls_need_the_key(tmp_path: Path) -> None:
    async with with_pod(tmp_path) as dfs:
        for method, path in DFS_CONTROLS:
            for wrong in ({}, dfs.headers, {"Authorization": "Bearer x"}):
                async with dfs.client.request(method, path, json={}, headers=wrong) as response:
                    assert response.status == 401, path
        assert (await dfs.post("/devnet/faults", latency_s=0.001))[0] == 200


async def test_the_app_key_controls_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as market:
        for method, path in MARKET_CONTROLS:
            for key in ("x", APP_KEY):
                headers = {"Authorization": f"Bearer {key}"}
                url = market.url + path
                async with market.http.request(method, url, json={}, headers=headers) as response:
                    assert response.status == 401, path
        headers = {"Authorization": f"Bearer {MARKET_CONTROL_KEY}"}
        async with market.http.get(market.url + "/me", headers=headers) as response:
            assert response.status == 401


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_what_a_page_can_send_unasked_changes_nothing(tmp_path: Path, kind: str) -> None:
    async with with_pod(tmp_path) as dfs:
        body, headers = b'{"latency_s": 5}', KEY | {"Content-Type": kind}
        async with dfs.client.post("/devnet/faults", data=body, headers=headers) as response:
            assert response.status == 415
        assert (await dfs.get("/devnet/faults"))[1]["latency_s"] == 0


FOREIGN: tuple[Mapping[str, str], ...] = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Host": "evil.example"},
    {"Host": "127.0.0.1.evil.example:80"},
    {"Host": "localhost@evil.example"},
    {"Host": ""},
)


@pytest.mark.parametrize("foreign", FOREIGN)
async def test_foreign_pages_are_refused_everywhere(
    tmp_path: Path, foreign: Mapping[str, str]
) -> None:
    calls = (("GET", "/v1/pod/ls"), ("POST", "/v2/user/login"), ("GET", "/"), *DFS_CONTROLS)
    login = {"userName": "ann", "password": PASSWORD}
    async with with_pod(tmp_path / "dfs") as dfs:
        for method, path in calls:
            headers = {**dfs.headers, **(KEY if (method, path) in DFS_CONTROLS else {}), **foreign}
            async with dfs.client.request(method, path, json=login, headers=headers) as response:
                assert response.status == 403, path
    async with served(tmp_path / "market") as market:
        for path in ("/me", "/registry/v1/image/info?tag=x", "/devnet/misbehave"):
            async with market.http.get(market.url + path, headers=foreign) as response:
                assert response.status == 403, path


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7", "[::1]:80", "LOCALHOST:1"])
async def test_this_machine_by_all_its_names(tmp_path: Path, host: str) -> None:
    async with with_pod(tmp_path) as dfs:
        own = {"Host": host, "Origin": f"http://{host}"}
        async with dfs.client.get("/v1/pod/ls", headers=dfs.headers | own) as response:
            assert response.status == 200


def test_the_key_is_in_a_private_file_and_nowhere_else(tmp_path: Path) -> None:
    with launch.start(tmp_path, ("--no-market",)) as server:
        devnet: Any = server.devnet
        assert devnet.control_key_file.stat().st_mode & 0o777 == 0o600
        key = devnet.control_headers()["Authorization"].removeprefix("Bearer ")
        holders = [
            path
            for path in tmp_path.rglob("*")
            if path.is_file() and key.encode() in path.read_bytes()
        ]
        assert holders == [devnet.control_key_file]
        for pid in (devnet.pid, os.getpid()):
            assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
