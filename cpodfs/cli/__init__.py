"""The command line: ``cpodfs COMMAND``. Each module holds one group of commands and no logic."""

from __future__ import annotations

import sys
from typing import Any

import click

from cpodfs import __version__
from cpodfs.cli.cache import cache
from cpodfs.cli.demo import demo
from cpodfs.cli.doctor import doctor
from cpodfs.cli.forget import forget
from cpodfs.cli.inspect import refresh, sync
from cpodfs.cli.mount import mount
from cpodfs.cli.run import cancel, logs, run, runs
from cpodfs.cli.shown import say, say_lines
from cpodfs.cli.status import status
from cpodfs.cli.trust import fork, receive, share, trust
from cpodfs.cli.umount import umount
from cpodfs.devnet.cli import devnet
from cpodfs.errors import CpodfsError


class _Cli(click.Group):
    """Errors that are ours become one line on stderr and exit code 1."""

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


for command in (
    *(mount, umount, status, sync, refresh),
    *(run, runs, logs, cancel),
    *(trust, fork, share, receive, forget),
    *(doctor, cache, demo, devnet),
):
    main.add_command(command)
