"""Pods received from others, by those who cannot or will not keep them as they are."""

from __future__ import annotations

import pytest

from tests.mount.compute import compute_pod
from tests.mount.harness import Mount, Server, mounted
from tests.mount.strangers import strangers_pod


@pytest.fixture
def received(mount: Mount, server: Server) -> str:
    """The name of a pod that the mount's user has received."""
    said = mount.cli("receive", strangers_pod(server), "--mount", str(mount.point)).stdout
    path, _, _ = said.partition(": received")
    return path.rpartition("/")[2]


@pytest.mark.parametrize("command", ["run", "trust"])
def test_what_it_cannot_do_and_what_can(mount: Mount, received: str, command: str) -> None:
    done = mount.cli(command, str(mount.point / received), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cpodfs: {received}: Read-only file system; it was received: ")
    assert "cpodfs fork" in done.stderr


def test_it_can_be_forgotten_and_received_again(
    mount: Mount, server: Server, received: str
) -> None:
    pod = mount.point / received
    assert list(pod.iterdir())
    inside = mount.cli("forget", str(pod / "a.recipe"), check=False)
    assert inside.returncode == 1
    assert "is inside a pod" in inside.stderr
    assert mount.cli("forget", str(pod)).stdout == f"{pod}: forgotten\n"
    assert not pod.exists()
    mount.remount(wipe=True)
    assert not pod.exists()
    mount.sync()


def test_its_owner_does_not_notice(mount: Mount, tmp_path_factory: pytest.TempPathFactory) -> None:
    (mount.pod("shared") / "file").write_text("text")
    reference = mount.cli("share", str(mount.point / "shared")).stdout.strip()
    with mounted(tmp_path_factory.mktemp("other"), mount.server) as other:
        other.cli("receive", reference, "--mount", str(other.point))
        assert (other.point / "shared/file").read_text() == "text"
        other.cli("forget", str(other.point / "shared"))
        other.cli("receive", reference, "--mount", str(other.point))
        assert (other.point / "shared/file").read_text() == "text"
    mount.remount(wipe=True)
    assert (mount.point / "shared/file").read_text() == "text"


def test_ones_own_pod_is_not_forgotten(mount: Mount) -> None:
    pod = compute_pod(mount, "mine", "true")
    mount.sync()
    done = mount.cli("forget", str(pod), check=False)
    assert done.returncode == 1
    assert "mine: was not received" in done.stderr
    assert (pod / "a.recipe").exists()


@pytest.mark.parametrize("option", [[], ["--fork", "new"]])
@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("", "not a reference to a pod; it is what `cpodfs share` prints"),
        ("zzz", "not a reference to a pod; it is what `cpodfs share` prints"),
        ("ab" * 32, "the server finds no pod at this reference"),
    ],
)
def test_references_to_nothing(
    mount: Mount, reference: str, reason: str, option: list[str]
) -> None:
    done = mount.cli("receive", reference, "--mount", str(mount.point), *option, check=False)
    assert (done.returncode, done.stderr) == (1, f"cpodfs: {reason}\n")
    assert list(mount.point.iterdir()) == []


def test_a_name_that_is_taken(mount: Mount) -> None:
    pod = mount.pod("mine")
    mount.sync()
    reference = mount.cli("share", str(pod)).stdout.strip()
    done = mount.cli("receive", reference, "--mount", str(mount.point), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("cpodfs: mine: you have a pod of that name, your own or received")
