"""``cpodfs cache``: what is in an account's cache folder, and how to get it out without a mount."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from cpodfs.cache import folder as cache_folder
from cpodfs.cli.options import PATH
from cpodfs.cli.shown import say
from cpodfs.config import cache_folders
from cpodfs.errors import ConfigError
from cpodfs.words import count, size

_folder_option = click.option(
    "--folder",
    type=PATH,
    help="The account's cache folder; `cpodfs status` names it.  [default: the only one there is]",
)


@click.group()
def cache() -> None:
    """Look at a cache that is not mounted, and copy out what no mount would show."""


@cache.command()
@_folder_option
def check(folder: Path | None) -> None:
    """Compare every content with what the journal says of it. Exits with 1 if something is wrong.

    Nothing is removed. What the server has is fetched again when it is opened.
    """
    found = cache_folder.check(_found(folder))
    for text in found.notices:
        say(text)
    for path, there in found.unclaimed:
        say(f"unclaimed: {path} ({size(there)})")
    for damage in found.damaged:
        kind = "lost" if damage.is_pending else "to be fetched again"
        say(f"{kind}: {damage.path!r}: {damage.what}")
    say(f"{count(found.files, 'content')} looked at, {size(found.bytes)}")
    if found.unclaimed:
        option = "" if folder is None else f" --folder {shlex.quote(str(folder))}"
        say(f"to copy out what is unclaimed: cpodfs cache rescue{option} DIR")
    sys.exit(1 if found.unclaimed or found.damaged else 0)


@cache.command()
@_folder_option
@click.argument("target", metavar="DIR", type=PATH)
def rescue(folder: Path | None, target: Path) -> None:
    """Copy to DIR, new or empty, what no name belongs to; all contents, if the journal is unusable.

    Nothing is removed from the cache.
    """
    copied, total = cache_folder.rescue(_found(folder), target)
    say(f"{target}: {count(copied, 'file')} copied, {size(total)}")


def _found(folder: Path | None) -> Path:
    if folder is None:
        folders = cache_folders()
        if len(folders) != 1:
            here = "".join(f"\n  {path}" for path in folders) or " none is there"
            raise ConfigError(f"--folder: which cache? In the usual place:{here}")
        return folders[0]
    if not (folder / "content").is_dir():
        raise ConfigError(f"{folder}: is no cache folder; `cpodfs status` names a mount's")
    return folder
