"""``cpodfs demo``: the main job from end to end, on this machine alone."""

from __future__ import annotations

import click


@click.command()
@click.option("--exit", "leave", is_flag=True, help="Stop by itself when everything was shown.")
def demo(leave: bool) -> None:
    """Show the main job from end to end: no account, no network."""
    raise click.ClickException("soon")
