"""The devnet as a process: what it says, what survives it, what it costs in memory."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

from cpodfs.devnet import launch
from tests.patience import PATIENCE_S

STORE_ONLY = ("--no-market",)
_CHUNK = b"\xa5" * (1 << 20)


class Client:
    """Blocking calls to a devnet by its URL, logged in as the default user."""

    def __init__(self, devnet: launch.Devnet) -> None:
        self.address = urlsplit(devnet.dfs_url)
        body = {"userName": devnet.user, "password": devnet.password()}
        self.token = ""
        self.token = self.call("POST", "/v2/user/login", body)["accessToken"]

    def call(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        status, data = self.request(method, path, json.dumps(body) if body else None, headers)
        assert status < 400, data
        return json.loads(data)

    def request(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address.netloc, timeout=PATIENCE_S)
        try:
            bearer = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            connection.request(method, path, body, headers | bearer)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def upload(self, name: str, chunks: list[bytes]) -> None:
        head, tail = form(name)
        size = len(head) + sum(map(len, chunks)) + len(tail)
        headers = {"Content-Type": "multipart/form-data; boundary=B", "Content-Length": str(size)}

        def body() -> Iterator[bytes]:
            yield head
            yield from chunks
            yield tail

        status, data = self.request("POST", "/v1/file/upload", body(), headers)
        assert status == 200, data

    def files(self) -> dict[str, int]:
        listing = self.call("GET", "/v1/dir/ls?podName=p&dirPath=/")
        return {entry["name"]: int(entry["size"]) for entry in listing.get("files", [])}


def form(name: str) -> tuple[bytes, bytes]:
    """What surrounds the content in a multipart upload to the root of pod ``p``."""
    fields = {"podName": "p", "dirPath": "/", "blockSize": "1Mb"}
    head = "".join(
        f'--B\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in fields.items()
    )
    head += f'--B\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode(), b"\r\n--B--\r\n"


def rss_peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def test_state_and_address_survive_a_restart(tmp_path: Path) -> None:
    with launch.start(tmp_path, STORE_ONLY) as first:
        client = Client(first.devnet)
        client.call("POST", "/v1/pod/new", {"podName": "p"})
        client.upload("f", [b"kept"])
    with launch.start(tmp_path, STORE_ONLY) as second:
        assert second.devnet.dfs_url == first.devnet.dfs_url
        assert second.devnet.password() == first.devnet.password()
        status, data = client.request("GET", "/v1/pod/ls", None, {})
        assert (status, json.loads(data)) == (401, {"message": "jwt: invalid token"})
        again = Client(second.devnet)
        assert again.files() == {"f": 4}
        path = "/v1/file/download?podName=p&filePath=/f"
        assert again.request("GET", path, None, {}) == (200, b"kept")


def test_a_kill_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    server = launch.start(tmp_path, STORE_ONLY)
    client = Client(server.devnet)
    client.call("POST", "/v1/pod/new", {"podName": "p"})
    client.upload("f", [b"old"])
    temp = tmp_path / "dfs" / "tmp"
    head, _ = form("f")
    lines = [
        "POST /v1/file/upload HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {client.token}",
        "Content-Type: multipart/form-data; boundary=B",
        "Content-Length: 99999999",
    ]
    address = (client.address.hostname, client.address.port)
    with socket.create_connection(address, timeout=PATIENCE_S) as raw:
        raw.sendall("\r\n".join([*lines, "", ""]).encode() + head)
        while not any(path.stat().st_size for path in temp.iterdir()):
            raw.sendall(_CHUNK)
        server.kill()
    assert list(temp.iterdir())
    with launch.start(tmp_path, STORE_ONLY) as restarted:
        again = Client(restarted.devnet)
        assert again.files() == {"f": 3}
        path = "/v1/file/download?podName=p&filePath=/f"
        assert again.request("GET", path, None, {}) == (200, b"old")
        assert list(temp.iterdir()) == []
        again.upload("f", [b"new one"])
        assert again.files() == {"f": 7}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    with launch.start(tmp_path, STORE_ONLY) as server:
        client = Client(server.devnet)
        client.call("POST", "/v1/pod/new", {"podName": "p"})
        client.upload("small", [_CHUNK])
        before = rss_peak_mib(server.devnet.pid)
        client.upload("large", [_CHUNK] * 200)
        assert client.files()["large"] == 200 << 20
        connection = http.client.HTTPConnection(client.address.netloc, timeout=PATIENCE_S)
        path = "/v1/file/download?podName=p&filePath=/large"
        connection.request("GET", path, headers={"Authorization": f"Bearer {client.token}"})
        response, received = connection.getresponse(), 0
        while chunk := response.read(1 << 20):
            received += len(chunk)
        connection.close()
        assert received == 200 << 20
        assert rss_peak_mib(server.devnet.pid) - before < 30


def test_one_devnet_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PREDECESSOR_DEADLINE_S", 0.1)
    with launch.start(tmp_path, STORE_ONLY) as first:
        with pytest.raises(launch.DevnetFailed, match=f"pid {first.devnet.pid}"):
            launch.start(tmp_path, STORE_ONLY)
        assert Client(first.devnet).token


@pytest.mark.parametrize("way", ["start", "running"])
def test_the_end_of_the_one_before_is_waited_for(tmp_path: Path, way: str) -> None:
    async def successor() -> int:
        async with launch.running(tmp_path, STORE_ONLY) as devnet:
            return devnet.pid

    (tmp_path / "lock").touch()
    # Holds the folder, as a devnet does that is still ending, until it may end.
    code = "import fcntl, sys; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); open(sys.argv[1])"
    os.mkfifo(gate := tmp_path / "gate")
    with (
        (tmp_path / "lock").open("r+") as lock,
        subprocess.Popen(
            [sys.executable, "-S", "-c", code, str(gate)], stdin=lock, stdout=subprocess.PIPE
        ) as before,
    ):
        lock.close()
        assert before.stdout is not None
        before.stdout.readline()
        asked = threading.Event()
        seen = launch.is_taken

        def is_taken(state: Path) -> bool:
            answer = seen(state)
            asked.set()
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "is_taken", is_taken)
            opener = threading.Thread(target=lambda: (asked.wait(), gate.write_bytes(b"")))
            opener.start()
            if way == "start":
                launch.start(tmp_path, STORE_ONLY).stop()
            else:
                trio.run(successor)
            opener.join()


def test_a_taken_port_and_a_wrong_option_are_named(tmp_path: Path) -> None:
    with launch.start(tmp_path / "a", STORE_ONLY) as first:
        port = urlsplit(first.devnet.dfs_url).port
        with pytest.raises(launch.DevnetFailed, match=f"--dfs-port {port}"):
            launch.start(tmp_path / "b", (*STORE_ONLY, "--dfs-port", str(port)))
    with pytest.raises(launch.DevnetFailed, match="error_rate"):
        launch.start(tmp_path / "b", (*STORE_ONLY, "--error-rate", "3"))


def test_secrets_are_private_and_the_server_is_local(tmp_path: Path) -> None:
    with launch.start(tmp_path, STORE_ONLY) as server:
        devnet = server.devnet
        assert devnet.password_file.stat().st_mode & 0o777 == 0o600
        assert urlsplit(devnet.dfs_url).hostname == "127.0.0.1"
        everything = [path for path in tmp_path.rglob("*") if path.is_file()]
        secret = devnet.password().encode()
        holders = [path for path in everything if secret in path.read_bytes()]
        assert holders == [devnet.password_file]
        command = Path(f"/proc/{devnet.pid}/cmdline").read_bytes()
        assert secret not in command


def test_it_ends_on_sigterm_though_a_connection_is_open(tmp_path: Path) -> None:
    with launch.start(tmp_path, STORE_ONLY) as server:
        client = Client(server.devnet)
        address = (client.address.hostname, client.address.port)
        with socket.create_connection(address, timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /v1/file/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
            os.kill(server.devnet.pid, signal.SIGTERM)
            # Far less than the minute that aiohttp itself would wait for the connection.
            assert server.wait(30) == 0


def test_it_ends_with_its_standard_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cpodfs.devnet", "--no-market", "--state", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stdin-eof"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 1)
    assert launch.Devnet.parse(done.stdout).yagna_url is None


def test_from_trio_with_the_market(tmp_path: Path) -> None:
    async def main() -> launch.Devnet:
        async with launch.running(tmp_path) as devnet:
            assert Client(devnet).token
            assert devnet.yagna_url is not None
            assert devnet.app_key_file is not None
            assert devnet.run_path_dir is not None
            assert (devnet.run_path_dir / "gftp").exists()
            key = devnet.app_key_file.read_text().strip()
            market = urlsplit(devnet.yagna_url)
            connection = http.client.HTTPConnection(market.netloc, timeout=PATIENCE_S)
            connection.request("GET", "/me", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == 200
            connection.close()
            return devnet

    devnet = trio.run(main)
    assert not Path(f"/proc/{devnet.pid}").exists()


def test_from_trio_when_it_fails(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(launch.DevnetFailed, match="No such option"):
            async with launch.running(tmp_path, ("--no-such-option",)):
                raise AssertionError("it must not start")

    trio.run(main)
