"""The command line: ``cpodfs COMMAND``. Each module holds one group of commands and no logic.

A command's module is imported when it is asked for: a command need not wait for what others import.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from cpodfs import __version__
from cpodfs.cli.shown import say, say_lines
from cpodfs.errors import CpodfsError

_MODULES = {
    **dict.fromkeys(("sync", "refresh"), "cpodfs.cli.inspect"),
    **dict.fromkeys(("run", "runs", "logs", "cancel"), "cpodfs.cli.run"),
    **dict.fromkeys(("trust", "fork", "share", "receive"), "cpodfs.cli.trust"),
    "devnet": "cpodfs.devnet.cli",
    **{
        name: f"cpodfs.cli.{name}"
        for name in ("mount", "umount", "status", "forget", "doctor", "cache", "demo")
    },
}


class _Cli(click.Group):
    """Errors that are ours become one line on stderr and exit code 1."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(_MODULES)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        command: click.Command = getattr(importlib.import_module(_MODULES[name]), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CpodfsError as error:
            (say_lines if error.several_lines else say)(f"cpodfs: {error}", err=True)
            sys.exit(1)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cpodfs")
def main() -> None:
    """Pods of FairOS-DFS as folders, and Golem runs by touching a file.

    \b
      cpodfs mount ~/pods           every pod is a folder
      touch ~/pods/blender/.run     start what its recipe says
      tail -f ~/pods/blender/logs/*/stdout.log
      cpodfs umount ~/pods          upload what is pending, then unmount

    New here? `cpodfs demo` shows all of it, with no account and no network.
    """
