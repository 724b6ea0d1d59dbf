"""``cpodfs forget``: the end of a received pod, here."""

from __future__ import annotations

import click

from cpodfs.cli.pods import find_pod


@click.command()
@click.argument("pod")
def forget(pod: str) -> None:
    """Take POD, a received pod, out of your account. Its owner's pod is not touched.

    Whoever has the reference can receive it again.
    """
    found = find_pod(pod)
    found.ask("forget")
    click.echo(f"{found.path}: forgotten")
