"""Pods that may not run: the touch fails, and says why in the log and in an attribute."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cpodfs.dfs import Client, Session
from tests.mount.compute import compute_pod, record, run_to_end
from tests.mount.harness import Mount, Server, mounted, run, sh

REFUSED = {
    "not JSON": ("{", "a.recipe: is not JSON"),
    "a list": ("[]", "a.recipe: must be a JSON object"),
    "no golem": ("{}", "a.recipe: golem: is missing"),
    "no exec": ('{"golem": {}}', "a.recipe: golem.exec: is missing"),
    "empty exec": ('{"golem": {"exec": " "}}', "a.recipe: golem.exec: must not be empty"),
    "exec is a list": ('{"golem": {"exec": ["a"]}}', "a.recipe: golem.exec: must be text"),
    "quotes": (
        '{"golem": {"exec": "echo \'a"}}',
        "a.recipe: golem.exec: cannot be split into words",
    ),
    "dots": (
        '{"golem": {"exec": "a", "output": "../o"}}',
        "a.recipe: golem.output: must not contain '..'",
    ),
    "absolute": (
        '{"golem": {"exec": "a", "log": "/tmp"}}',
        "a.recipe: golem.log: must be relative",
    ),
    "public": ('{"public": "yes", "golem": {"exec": "a"}}', "a.recipe: public: must be true"),
}


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Mount]:
    """One mount for all tests, which take a pod of their own each."""
    with mounted(tmp_path_factory.mktemp("refused"), server) as mount:
        yield mount


def touch_fails(pod: Path) -> str:
    """The message of a ``touch .run`` that must be refused."""
    done = subprocess.run(["touch", ".run"], cwd=pod, capture_output=True, text=True)
    assert done.returncode == 1
    assert not (pod / ".run").exists()
    return done.stderr


def reason(pod: Path) -> str:
    return os.getxattr(pod, "user.cpodfs.error").decode()


def test_without_a_recipe_the_touch_is_refused(mount: Mount) -> None:
    pod = mount.pod("plain")
    assert "Operation not supported" in touch_fails(pod)
    assert reason(pod).startswith("plain: not a compute pod: there is no recipe.json")
    assert "run refused pod='plain': plain: not a compute pod" in mount.logged()
    (pod / "recipe.json").write_text('{"golem": {"exec": "true"}}')
    run_to_end(pod)
    with pytest.raises(OSError) as caught:
        reason(pod)
    assert caught.value.errno == errno.ENODATA


@pytest.mark.parametrize("what", REFUSED)
def test_broken_recipes_are_refused_by_file_and_field(mount: Mount, what: str) -> None:
    content, expected = REFUSED[what]
    pod = mount.pod("broken")
    (pod / "a.recipe").write_text(content)
    assert "Exec format error" in touch_fails(pod)
    assert expected in reason(pod)
    assert expected in mount.logged()
    assert not (pod / "logs").exists()


def test_a_mended_recipe_runs(mount: Mount) -> None:
    pod = compute_pod(mount, "mended", " ")
    touch_fails(pod)
    sh("""sed -i 's/" "/"echo mended"/' a.recipe""", pod)
    assert (run_to_end(pod) / "stdout.log").read_text() == "mended\n"
    with pytest.raises(OSError):
        reason(pod)


def test_a_recipe_of_a_gigabyte(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        run("truncate", "-s", "1G", pod / "x.recipe")
        assert "Exec format error" in touch_fails(pod)
        assert reason(pod) == "x.recipe: is larger than 1024 KiB"
        peak = Path(f"/proc/{mount.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        assert int(peak) < 300_000, "kB; it was read whole"
        (pod / "x.recipe").unlink()


def test_unknown_keys_and_other_recipes_are_warned_about(mount: Mount) -> None:
    pod = mount.pod("warned")
    (pod / "recipe.json").write_text('{"colour": "red", "golem": {"exec": "true"}}')
    (pod / "other.recipe").write_text("{")
    ended = record(run_to_end(pod))
    assert ended["recipe_file"] == "recipe.json"
    assert ended["warnings"] == [
        "recipe.json: is used; there are other recipes: other.recipe",
        "recipe.json: colour: unknown key, kept",
    ]
    assert all(warning in mount.logged() for warning in ended["warnings"])


def test_a_received_pod_is_not_run(tmp_path: Path, server: Server) -> None:
    owner, receiver = server.signup(), server.signup()
    for folder in ("owner", "receiver"):
        (tmp_path / folder).mkdir()
    with mounted(tmp_path / "owner", server, owner) as mount:
        compute_pod(mount, "shared", "true")
        assert mount.stop() == 0
    hand_over(server, owner, receiver, "shared")
    with mounted(tmp_path / "receiver", server, receiver) as mount:
        (pod,) = mount.point.iterdir()
        assert "Read-only file system" in touch_fails(pod)
        assert "Read-only" in reason(pod)


def hand_over(server: Server, owner: tuple[str, str], receiver: tuple[str, str], pod: str) -> None:
    """Share a pod, and receive it, as other programs of the two users would."""

    async def share() -> None:
        async with Session(server.url, owner[0], lambda: owner[1]) as session:
            reference = await Client(session).share_pod(pod)
        async with Session(server.url, receiver[0], lambda: receiver[1]) as session:
            await Client(session).receive_pod(reference)

    trio.run(share)
