"""A pod that was made here is one's own only as long as the server had no other of that name."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from cpodfs.cli.pods import request
from cpodfs.dfs import Client, Session
from tests.mount.compute import compute_pod, run_folders, run_to_end
from tests.mount.harness import Mount, Server, mounted
from tests.mount.strangers import forked, strangers_pod, touch

STALE = ("--attr-ttl", "600")
"""What others change is not seen unless it is asked for."""


@pytest.fixture
def stale(tmp_path: Path, server: Server) -> Iterator[Mount]:
    with mounted(tmp_path, server, None, *STALE) as mount:
        os.listdir(mount.point)
        yield mount


def elsewhere(mount: Mount, work: Callable[[Client], Awaitable[object]]) -> None:
    """The same account, in another session."""

    async def do() -> None:
        password = mount.password_file.read_text()
        async with Session(mount.server.url, mount.user, lambda: password) as session:
            await work(Client(session))

    trio.run(do)


def fork_elsewhere(mount: Mount, name: str, reference: str = "") -> None:
    reference = reference or strangers_pod(mount.server)
    elsewhere(mount, lambda client: client.fork_from_reference(name, reference))


def look(mount: Mount, pod: Path) -> None:
    mount.cli("refresh", str(mount.point))
    mount.cli("refresh", str(pod))


def refused(pod: Path) -> None:
    """A stranger's program is in the pod, and is not run."""
    assert (pod / "script/x.sh").read_text() == "echo ran"
    assert "Permission denied" in touch(pod)
    assert "its code is a stranger's" in os.getxattr(pod, "user.cpodfs.error").decode()
    assert run_folders(pod) == []


def test_a_pod_made_where_the_server_had_one_of_that_name(stale: Mount) -> None:
    fork_elsewhere(stale, "clash")
    pod = stale.pod("clash")
    stale.sync()
    look(stale, pod)
    refused(pod)
    stale.remount()
    refused(pod)


def test_a_pod_made_without_the_server(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *STALE) as mount:
        os.listdir(mount.point)
        fork_elsewhere(mount, "clash")
        own_server.kill()
        pod = compute_pod(mount, "clash", "sh script/y.sh")
        (pod / "script/y.sh").write_text("echo mine")
        run_to_end(pod)
        own_server.start_again()
        mount.sync()
        look(mount, pod)
        mount.cli("refresh", str(pod / "script"))
        assert (pod / "script/x.sh").read_text() == "echo ran"
        assert "Permission denied" in touch(pod)


def test_a_pod_made_before_the_driver_died(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *STALE) as mount:
        os.listdir(mount.point)
        own_server.kill()
        pod = mount.pod("clash")
        mount.kill()
        own_server.start_again()
        fork_elsewhere(mount, "clash")
        mount.start()
        mount.sync()
        look(mount, pod)
        refused(pod)


def test_a_pod_that_stayed_for_what_was_not_sent(tmp_path: Path, own_server: Server) -> None:
    """Deleted elsewhere, it would be made again, but a stranger's is forked there before that."""
    with mounted(tmp_path, own_server, None, *STALE) as mount:
        pod = mount.pod("clash")
        (pod / "link").symlink_to("nothing")
        mount.sync()
        reference = strangers_pod(own_server)
        own_server.faults(error_rate=1.0, match="/v1/pod/new")
        elsewhere(mount, lambda client: client.delete_pod("clash"))
        mount.cli("refresh", "--accept-deletions", str(pod))
        assert pod.exists()
        fork_elsewhere(mount, "clash", reference)
        own_server.faults()
        mount.sync()
        look(mount, pod)
        (pod / "link").unlink()
        refused(pod)


def test_a_pod_whose_name_a_received_one_took(stale: Mount) -> None:
    """Read-only, it cannot be run; and when it is no longer so it is not one's own."""
    reference = strangers_pod(stale.server)
    name = request(stale.point, "receive", reference=reference, new=None)["pod"]
    elsewhere(stale, lambda client: client.delete_pod(name))
    stale.cli("refresh", "--accept-deletions", str(stale.point / name))
    own = compute_pod(stale, name, "true")
    stale.sync()
    run_to_end(own)

    async def swap(client: Client) -> None:
        await client.delete_pod(name)
        await client.receive_pod(reference)

    elsewhere(stale, swap)
    look(stale, own)
    assert "Read-only file system" in touch(own)
    elsewhere(stale, lambda client: client.delete_pod(name))
    fork_elsewhere(stale, name)
    look(stale, own)
    assert "Permission denied" in touch(own)


def test_a_fork_of_what_only_seemed_to_be_ones_own(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server, None, *STALE, "--writeback-delay", "600") as mount:
        os.listdir(mount.point)
        fork_elsewhere(mount, "clash")
        mount.pod("clash")
        request(mount.point, "fork", pod="clash", new="twin")
        refused(mount.point / "twin")


def test_a_pod_made_anew_is_ones_own_again(stale: Mount) -> None:
    pod = forked(stale, "anew")
    assert "Permission denied" in touch(pod)
    stale.sync()
    elsewhere(stale, lambda client: client.delete_pod("anew"))
    stale.cli("refresh", "--accept-deletions", str(pod))
    assert not pod.exists()
    run_to_end(compute_pod(stale, "anew", "true"))
    stale.sync()
    run_to_end(pod)
