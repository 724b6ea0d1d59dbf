"""The environment in which a requestor script finds the local market, and the programs it needs there.

Imports only `gftp`'s constants. Pure but for the small scripts that it writes: ``gftp``, and a ``python3``
that puts the hook for the registry (`sitehook`) back where a script has replaced PYTHONPATH. The app-key is
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
PYTHONS = ("python3", "python")

_PYTHON = """#!/bin/sh
# The next {name} on PATH, whose scripts find the local market's registry of images.
hook={hook}
case ":${{PYTHONPATH-}}:" in
    *":$hook:"*) ;;
    *) PYTHONPATH=$hook${{PYTHONPATH:+:$PYTHONPATH}}; export PYTHONPATH ;;
esac
set -f
IFS=:
for folder in $PATH; do
    [ "$folder" = {here} ] && continue
    [ -x "$folder/{name}" ] && [ -f "$folder/{name}" ] && exec "$folder/{name}" "$@"
done
echo "{name}: not found" >&2
exit 127
"""


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
    extended: with ``{}`` they hold our folders alone. ``tool_dir`` gets ``bin/gftp``, ``bin/python3`` and
    ``bin/python``, and is kept as long as the run; ``gftp_dir`` is the folder that the market was created
    with. Raises OSError when a program cannot be written.
    """
    base = os.environ if base is None else base
    program = write_gftp_program(tool_dir)
    for name in PYTHONS:
        words = {
            "hook": shlex.quote(str(HOOK_DIR)),
            "here": shlex.quote(str(program.parent.absolute())),
        }
        _write(program.with_name(name), _PYTHON.format(name=name, **words))
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
    # -P: a file of the pod's working directory must not stand in for a module of ours.
    _write(
        program, f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m cpodfs.devnet.gftp "$@"\n'
    )
    return program


def _write(program: Path, text: str) -> None:
    draft = program.with_name(f".{program.name}.{os.getpid()}")
    draft.write_text(text)
    draft.chmod(0o755)
    draft.replace(program)
