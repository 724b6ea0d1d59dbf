"""``cpodfs demo``: the main job from end to end, on this machine alone."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click

from cpodfs.demo.story import Story, fresh_folder


@click.command()
@click.option("--exit", "leave", is_flag=True, help="Stop by itself when everything was shown.")
def demo(leave: bool) -> None:
    """Show the main job from end to end: no account, no network, nothing left behind.

    Starts a local store and a local Golem market, mounts them in a fresh folder, makes a compute pod
    there, runs it by touching .run, and shows the log, the output, and that the pod survives a
    remount with an empty cache. Then everything stays mounted, for you to look around, until Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    with fresh_folder() as folder:
        story = Story(folder, _say)
        told = False
        try:
            story.tell()
            told = True
            if not leave:
                _say(f"\nLook around in {story.pods}, from another terminal.")
                _say("Ctrl-C here unmounts it and removes all that this demo has made.")
                signal.pause()
        except KeyboardInterrupt:
            _say("")
            if not told:
                story.stop()
                sys.exit(130)
        except BaseException:
            story.stop()
            raise
        try:
            story.unmount()
        finally:
            story.stop()
    _say("Done: unmounted, and the demo's folder is removed.")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str, *, nl: bool = True) -> None:
    click.echo(text, nl=nl)
    sys.stdout.flush()
