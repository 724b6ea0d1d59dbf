"""``cpodfs devnet`` by itself, and a mount that uses it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.compute import DevnetMount, compute_pod, devnet_mounted, record, run_to_end
from tests.mount.harness import CPODFS, Child
from tests.patience import PATIENCE_S


@pytest.fixture
def devnet(tmp_path: Path) -> Iterator[Child]:
    """One that was started with the state folder that a `DevnetMount` has, and a fault."""
    command = [*CPODFS, "devnet", "--state", str(tmp_path / "devnet"), "--provider", "odd-one"]
    with Child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_mount_joins_it_and_runs_find_its_market(tmp_path: Path, devnet: Child) -> None:
    assert devnet.stdout is not None
    assert devnet.stderr is not None
    ready = json.loads(devnet.stdout.readline())
    # Where there is no sandbox, that is said before.
    said = next(line for line in devnet.stderr if line.startswith("cpodfs: "))
    assert said == (
        f"cpodfs: mount it with: cpodfs mount --devnet --devnet-state {tmp_path}/devnet DIR\n"
    )
    with devnet_mounted(tmp_path) as mount:
        assert mount.status()["server"] == ready["dfs_url"]
        pod = compute_pod(mount, "words", "python3 script/words.py payload/1.txt", "words.py")
        (pod / "payload").mkdir()
        (pod / "payload/1.txt").write_text("two words")
        folder = run_to_end(pod)
        assert record(folder)["state"] == "finished", (folder / "stderr.log").read_text()
        assert "odd-one" in (folder / "stdout.log").read_text()
        assert mount.stop() == 0
        assert devnet.poll() is None
        mount.start()
        assert (pod / "payload/1.txt").read_text() == "two words"
    devnet.send_signal(signal.SIGTERM)
    assert devnet.wait(PATIENCE_S) == 0


def test_the_devnet_of_another_mount_is_not_joined(tmp_path: Path) -> None:
    """It ends with that mount."""
    with devnet_mounted(tmp_path) as mount:
        other = DevnetMount(tmp_path / "other", "--devnet-state", str(mount.devnet))
        done = subprocess.run(
            other.command(), capture_output=True, text=True, env=other.env, timeout=PATIENCE_S
        )
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert said.startswith(f"cpodfs: the devnet did not start: {mount.devnet}: a devnet (pid ")
        assert said.endswith("is using this folder; stop it, or name another")
