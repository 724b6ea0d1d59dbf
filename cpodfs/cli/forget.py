"""``cpodfs forget``: the end of a received pod, here."""

from __future__ import annotations

from pathlib import Path

import click

from cpodfs.cli.pods import find_pod
from cpodfs.cli.shown import say
from cpodfs.errors import MountError
from cpodfs.mountpoint import resolved


@click.command()
@click.argument("pod")
def forget(pod: str) -> None:
    """Take POD, a received pod, out of your account. Its owner's pod is not touched.

    Whoever has the reference can receive it again.
    """
    found = find_pod(pod)
    if "/" in pod and resolved(Path(pod)) != found.path:
        raise MountError(f"{pod}: is inside a pod; to forget all of it: cpodfs forget {found.path}")
    found.ask("forget")
    say(f"{found.path}: forgotten")
