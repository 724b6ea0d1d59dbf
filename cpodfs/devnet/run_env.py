"""The environment in which a requestor script finds the local market, and its ``gftp`` program.

Imports only `gftp`'s constants. Pure but for the one small script that it writes. The app-key is
in the result: hand it to the process's environment, never to an argument or a log.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from cpodfs.devnet.gftp import GFTP_DIR_VARIABLE

HOOK_DIR = Path(__file__).with_name("sitehook")


def run_environment(
    *,
    market_url: str,
    app_key: str,
    tool_dir: Path,
    gftp_dir: Path,
    base: Mapping[str, str] | None = None,
    subnet: str = "public",
    driver: str = "erc20",
    network: str = "hoodi",
) -> dict[str, str]:
    """The variables to *add* to a requestor's environment, which starts from ``base``.

    ``base`` (default: this process's environment) only supplies the PATH and PYTHONPATH that are
    extended: with ``{}`` they hold our folders alone. ``tool_dir`` gets ``bin/gftp`` and is kept as long as the run; ``gftp_dir`` is the
    folder that the market was created with. Raises OSError when the program cannot be written.
    """
    base = os.environ if base is None else base
    program = write_gftp_program(tool_dir)
    root = market_url.rstrip("/")
    return {
        "YAGNA_APPKEY": app_key,
        "YAGNA_API_URL": root,
        "YAGNA_SUBNET": subnet,
        "YAGNA_PAYMENT_DRIVER": driver,
        "YAGNA_PAYMENT_NETWORK": network,
        "CPODFS_REGISTRY_URL": f"{root}/registry",
        GFTP_DIR_VARIABLE: str(gftp_dir.absolute()),
        "PATH": _prefixed(program.parent, base.get("PATH", "")),
        "PYTHONPATH": _prefixed(HOOK_DIR, base.get("PYTHONPATH", "")),
    }


def _prefixed(folder: Path, folders: str) -> str:
    return f"{folder.absolute()}{os.pathsep}{folders}" if folders else str(folder.absolute())


def write_gftp_program(tool_dir: Path) -> Path:
    """Write ``bin/gftp`` below ``tool_dir``, whole or not at all; its path."""
    program = tool_dir / "bin" / "gftp"
    program.parent.mkdir(parents=True, exist_ok=True)
    draft = program.with_name(f".gftp.{os.getpid()}")
    # -P: a file of the pod's working directory must not stand in for a module of ours.
    command = f'exec {shlex.quote(sys.executable)} -P -m cpodfs.devnet.gftp "$@"'
    draft.write_text(f"#!/bin/sh\n{command}\n")
    draft.chmod(0o755)
    draft.replace(program)
    return program
