"""A logged-in client of the development server, for the tests of the server itself."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import ClientResponse, FormData, web
from aiohttp.test_utils import TestClient, TestServer

from cpodfs.devnet.dfs_server import create_app
from cpodfs.devnet.faults import Faults

PASSWORD = "correct horse battery"
CONTROL_KEY = "control-key"
_CONTROLS = ("/devnet/", "/v2/user/signup")


class Dfs:
    """Calls by (path, arguments); every answer comes as (status, decoded body)."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.headers: dict[str, str] = {}

    async def get(self, path: str, **query: str) -> tuple[int, Any]:
        headers = self._headers(path)
        return await _decoded(await self.client.get(path, params=query, headers=headers))

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return await _decoded(await self.client.post(path, json=body, headers=self._headers(path)))

    async def faults(self, **faults: Any) -> None:
        status, body = await self.post("/devnet/faults", **faults)
        assert status == 200, body

    def _headers(self, path: str) -> dict[str, str]:
        key = {"Authorization": f"Bearer {CONTROL_KEY}"}
        return key if path.startswith(_CONTROLS) else self.headers

    async def delete(self, path: str, **body: str) -> tuple[int, Any]:
        return await _decoded(await self.client.delete(path, json=body, headers=self.headers))

    async def login(self, user: str = "ann", path: str = "/v2/user/login") -> None:
        status, body = await self.post(path, userName=user, password=PASSWORD)
        assert status in (200, 201), body
        self.headers = {"Authorization": f"Bearer {body['accessToken']}"}

    async def signup(self, user: str = "ann") -> None:
        await self.login(user, "/v2/user/signup")

    async def upload(
        self, directory: str, name: str, content: Any, pod: str = "p", **fields: str
    ) -> tuple[int, Any]:
        form = FormData(quote_fields=False)
        form.add_field("files", content, filename=name)
        for key, value in ({"blockSize": "1Mb"} | fields).items():
            form.add_field(key, value)
        form.add_field("podName", pod)
        form.add_field("dirPath", directory)
        response = await self.client.post("/v1/file/upload", data=form, headers=self.headers)
        return await _decoded(response)

    async def download(self, path: str, pod: str = "p") -> tuple[int, bytes]:
        query = {"podName": pod, "filePath": path}
        url = "/v1/file/download"
        async with self.client.get(url, params=query, headers=self.headers) as response:
            return response.status, await response.read()

    async def names(self, path: str, pod: str = "p") -> tuple[set[str], set[str]]:
        status, body = await self.get("/v1/dir/ls", podName=pod, dirPath=path)
        assert status == 200, body
        dirs, files = body.get("dirs", []), body.get("files", [])
        return {entry["name"] for entry in dirs}, {entry["name"] for entry in files}


async def _decoded(response: ClientResponse) -> tuple[int, Any]:
    if response.content_type == "application/json":
        return response.status, await response.json()
    return response.status, await response.text()


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[Dfs]:
    async with TestClient(TestServer(app)) as client:
        yield Dfs(client)


@contextlib.asynccontextmanager
async def with_pod(state: Path, faults: Faults | None = None, **options: Any) -> AsyncIterator[Dfs]:
    """A fresh server, user ``ann`` logged in, pod ``p`` made."""
    async with serving(create_app(state, faults, control_key=CONTROL_KEY, **options)) as dfs:
        await dfs.signup()
        assert (await dfs.post("/v1/pod/new", podName="p"))[0] == 201
        yield dfs
