"""Pods of somebody else, as they reach a user: a reference, from another account of the server."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path

import trio

from cpodfs.cli.pods import request
from cpodfs.dfs import Client, Session
from tests.mount.harness import Mount, Server

REPORT = Path(__file__).with_name("run_scripts") / "sandboxed.py"


def strangers_pod(server: Server, files: Mapping[str, str] | None = None) -> str:
    """A reference to a compute pod that another user has just made; its program echoes."""
    user, password = server.signup()
    return trio.run(_offer, server.url, user, password, recipe_files() if files is None else files)


def recipe_files(command: str = "sh script/x.sh", script: str = "echo ran") -> dict[str, str]:
    return {"a.recipe": json.dumps({"golem": {"exec": command}}), "script/x.sh": script}


async def _offer(url: str, user: str, password: str, files: Mapping[str, str]) -> str:
    async with Session(url, user, lambda: password) as session:
        client = Client(session)
        pod = f"theirs-{secrets.token_hex(4)}"
        await client.create_pod(pod)
        for folder in sorted({str(Path(name).parent) for name in files} - {"."}):
            await client.mkdir(pod, f"/{folder}")
        for name, text in files.items():
            await _upload(client, pod, Path("/") / name, text.encode())
        return await client.share_pod(pod)


async def _upload(client: Client, pod: str, path: Path, data: bytes) -> None:
    async def body():
        yield data

    await client.upload(pod, str(path.parent), path.name, body, len(data))


def forked(mount: Mount, name: str, files: Mapping[str, str] | None = None) -> Path:
    """A fork of a stranger's pod, made as a user would."""
    reference = strangers_pod(mount.server, files)
    request(mount.point, "receive", reference=reference, new=name)
    return mount.point / name


def vouch(pod: Path) -> None:
    """What ``cpodfs trust --yes POD`` does, without a process for it."""
    name = {"pod": pod.name}
    digest = request(pod.parent, "trust", **name)["hash"]
    request(pod.parent, "confirm", **name, digest=digest)


def touch(pod: Path) -> str:
    """What ``touch .run`` says; empty when it worked."""
    done = subprocess.run(["touch", ".run"], cwd=pod, capture_output=True, text=True)
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


def reason(pod: Path) -> str:
    """Why the last touch was refused."""
    return os.getxattr(pod, "user.cpodfs.error").decode()
