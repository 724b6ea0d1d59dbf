"""``cpodfs trust``, ``fork``, ``share`` and ``receive``: pods of others, and pods for others.

Imports `pods` and `shown`. What a stranger wrote cannot look like what we say of it.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from cpodfs import words
from cpodfs.cli.control import mount_of, tell
from cpodfs.cli.pods import Pod, find_pod, request
from cpodfs.cli.progress import drain_progress
from cpodfs.cli.shown import say, say_lines
from cpodfs.cli.umount import wait_until_idle
from cpodfs.errors import CpodfsError, RecipeError

_STALL_S = 30.0
_HOW = {
    "provider": ("at providers, for money", "Let this be run at providers, for your money?"),
    "market": (
        "on this machine, in a sandbox of the local market",
        "Let this be run as you, in a sandbox?",
    ),
    "sandbox": ("on this machine, in a sandbox", "Let this be run as you, in a sandbox?"),
    "bare": ("on this machine, WITHOUT a sandbox", "Let this be run as you, WITHOUT a sandbox?"),
    "refused": ("not now", "Let this be run as you, in a sandbox only?"),
}
"""How it would be run: what is said of it, and the question."""


@click.command()
@click.argument("pod")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--own", is_flag=True, help="It is your own pod, made elsewhere: always trust it.")
@click.option("--revoke", is_flag=True, help="Trust it no more, not even if you made it.")
def trust(pod: str, yes: bool, own: bool, revoke: bool) -> None:
    """Show what running POD would execute and, if you confirm it, allow that.

    The permission ends when anything in the pod changes but the payload, output and log folders; one
    of these counts, too, if the command speaks of it, and the payload if the command could find it
    unnamed (a line for a shell, a pattern, a variable). What is left out is said. Pods that you make
    in the mount need no permission; those that were forked, received or made elsewhere do.
    """
    if own and revoke:
        raise click.UsageError("--own and --revoke contradict each other")
    found = find_pod(pod)
    if revoke:
        known = found.ask("revoke")["known"]
        say(f"{found.name} {'is not trusted any more' if known else 'was not trusted'}")
        return
    report = found.ask("trust", own=own)
    _show(found, report)
    if report["own"]:
        say("It is your own: it runs without being asked for.")
        return
    if report["trusted"] and not own:
        say("It is trusted already.")
        return
    if report["trusted"] is False:
        which = f": {report['changed']}" if report["changed"] else ""
        say(f"It has CHANGED since it was trusted{which}")
    if not yes:
        question = "Is it your own, and all that it will become?" if own else _HOW[report["how"]][1]
        click.confirm(question, abort=True, err=True)
    if own:
        found.ask("own")
    else:
        found.ask("confirm", digest=report["hash"])
    say(f"{found.name} is trusted")


def _show(pod: Pod, report: dict[str, Any]) -> None:
    # Here: it imports much, which the other commands need not wait for.
    from cpodfs.recipe import RECIPE_LIMIT_BYTES, parse_recipe

    name = report["recipe"]
    with (pod.path / name).open("rb") as file:
        raw = file.read(RECIPE_LIMIT_BYTES + 1)
    if hashlib.sha256(raw).hexdigest() != report["recipe_sha256"]:
        raise RecipeError(f"{name}: changed just now; look again")
    recipe = parse_recipe(raw, file=name)
    say(f"{name}:")
    say_lines(raw.decode("utf-8", "replace").rstrip())
    say_lines(f"\nIt runs: {_line(shlex.join(recipe.exec_argv))}")
    why = f": {_line(report['why'])}" if report["why"] else ""
    say(f"{_HOW[report['how']][0]}{why}")
    say_lines(f"\nIts code, {report['count']} files and folders:")
    for path, size, executable in report["files"]:
        say(f"  {words.name(path)}  {words.size(size)}{'  executable' if executable else ''}")
    if report["count"] > len(report["files"]):
        say(f"  and {report['count'] - len(report['files'])} more, not shown")
    if left_out := [words.name(f"{folder}/") for folder in report["left_out"]]:
        some = " and ".join(filter(None, (", ".join(left_out[:-1]), left_out[-1])))
        say(f"{some} {'are' if left_out[1:] else 'is'} not part of what you trust")
    say_lines(f"\nHash: {report['hash']}")


def _line(text: str) -> str:
    """A stranger's text that stays in its line, whatever it is, and however wide the terminal."""
    return re.sub(" {2,}", lambda spaces: "\\x20" * len(spaces[0]), words.line(text))


@click.command()
@click.argument("pod")
@click.argument("new")
def fork(pod: str, new: str) -> None:
    """Make NEW, a pod of your own, a copy of POD at the server. May take minutes.

    The copy of a pod that is not your own must be trusted before it can be run.
    """
    found = find_pod(pod)
    _upload_first(found.mount)
    answer = found.ask("fork", new=new)
    _forked(found.mount / new, trusted=answer["own"])


@click.command()
@click.argument("pod")
def share(pod: str) -> None:
    """Print a reference with which anybody can receive or fork POD.

    It is a secret, it works for ever, and it cannot be taken back.
    """
    found = find_pod(pod)
    _upload_first(found.mount)
    say(found.ask("share")["reference"])


@click.command()
@click.argument("reference")
@click.option(
    "--fork", "new", metavar="NEW", help="Make a pod of your own of it, which can be run."
)
@click.option("--mount", type=Path, help="Into this mount; needed when there are several.")
def receive(reference: str, new: str | None, mount: Path | None) -> None:
    """Show the pod that REFERENCE leads to as a read-only folder.

    REFERENCE may be -, to read it from standard input, as arguments can be seen by other users.
    """
    if reference == "-":
        reference = sys.stdin.readline().strip()
    point = mount_of(mount)
    answer = request(point, "receive", reference=reference, new=new)
    if new is not None:
        _forked(point / new, trusted=False)
    else:
        say(f"{point / answer['pod']}: received, read-only")


def _forked(path: Path, *, trusted: bool) -> None:
    say(f"{path}: forked")
    if not trusted:
        say(f"Before it can be run: cpodfs trust {shlex.quote(str(path))}", err=True)


def _upload_first(mount: Path) -> None:
    """The server can only copy or share what it has."""
    tell(mount, "drain")
    try:
        with drain_progress() as progress:
            report = wait_until_idle(mount, _STALL_S, progress)
    finally:
        tell(mount, "drain", "0")
    if report["pending"] + report["deletions"]:
        raise CpodfsError(f"{mount}: not all is uploaded yet; see: cpodfs status")
