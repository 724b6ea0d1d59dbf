"""What the command line says when it will not. Imports the harness."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.mount.harness import Mount
from tests.patience import PATIENCE_S

NOWHERE = "http://127.0.0.1:1"


def refused(mount: Mount, *options: str, point: Path | None = None) -> str:
    """What ``cpodfs mount`` says when it refuses; it must leave nothing mounted."""
    command = [*mount.command(), *options]
    if point is not None:
        command[command.index("mount") + 1] = str(point)
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=mount.env,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cpodfs: ")
    return last
