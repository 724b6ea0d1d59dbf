"""That FairOS has a file does not mean that Swarm has: told apart, and not evicted before."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.mount.harness import Server, mounted
from tests.patience import until

NEVER_S = 10_000.0
QUICK = ("--writeback-delay", "0.1", "--cache-size", "1MB")


def state(path: Path) -> str:
    return os.getxattr(path, "user.cpodfs.state").decode()


def test_what_only_fairos_has_is_told_and_kept(tmp_path: Path, own_server: Server) -> None:
    own_server.faults(swarm_delay_s=NEVER_S)
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        (pod / "empty").touch()
        for name in "abc":
            (pod / name).write_bytes(name.encode() * 600_000)
        mount.sync()
        asked = "GET /v1/file/status"
        until(lambda: own_server.stats()["endpoints"].get(asked, {"count": 0})["count"] >= 3)
        assert [state(pod / name) for name in "abc"] == ["uploaded"] * 3
        assert state(pod / "empty") == "clean"
        assert mount.status()["not_in_swarm"] == {"files": 3, "bytes": 1_800_000}
        shown = re.sub(r"\s+", " ", mount.cli("status", str(pod)).stdout)
        assert "1.7 MiB uploaded, not in Swarm yet, in 3 files" in shown
        own_server.reset_calls()
        for name in "abc":
            assert (pod / name).read_bytes() == name.encode() * 600_000
        assert "GET /v1/file/download" not in own_server.calls(), "nothing was evicted"
        own_server.faults()
        until(lambda: [state(pod / name) for name in "abc"] == ["clean"] * 3)
        until(lambda: mount.status()["cache_use"]["clean"] <= 1_000_000)
        assert mount.status()["not_in_swarm"] == {"files": 0, "bytes": 0}


def test_a_server_that_does_not_know_counts_as_before(tmp_path: Path, own_server: Server) -> None:
    own_server.faults(error_rate=1.0, status=404, match="/v1/file/status")
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        (pod / "f").write_text("x")
        mount.sync()
        until(lambda: state(pod / "f") == "clean")
