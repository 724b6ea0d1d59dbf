"""``cpodfs demo``: the main job from end to end, on this machine alone."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from cpodfs.cli.shown import say_lines
from cpodfs.demo.story import DemoFailed, Story, fresh_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.option("--exit", "leave", is_flag=True, help="Stop by itself when everything was shown.")
def demo(leave: bool) -> None:
    """Show the main job from end to end: no account, no network, nothing left behind.

    Starts a local store and a local Golem market, mounts them in a fresh folder, makes a compute pod
    there, runs it by touching .run, and shows the log, the output, and that the pod survives a
    remount with an empty cache. Then everything stays mounted, for you to look around, until Ctrl-C.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    with fresh_folder() as folder:
        complete, inside = _told(Story(folder, _say), stay=not leave)
    if folder.exists():
        raise DemoFailed(f"{folder} could not be removed; it can go: rm -r {folder}")
    _say(f"Unmounted and removed {folder}, and with it all that this demo has made.")
    if inside:
        _say(f"Still in there: {', '.join(inside)}. Leave with: cd")
    if not complete:
        sys.exit(130)


def _told(story: Story, *, stay: bool) -> tuple[bool, list[str]]:
    """Tell it, wait for Ctrl-C if it is to ``stay``, and unmount; whether it was told to its end,
    and who was in the mount when it went."""
    complete = False
    try:
        story.tell()
        complete = True
        if stay:
            _say(f"\nLook around in {story.pods}, from another terminal.")
            _say(f"The picture is {story.picture}.")
            _say("Ctrl-C here unmounts it and removes all that this demo has made.")
            _wait_for_interrupt()
        _need_no_more()
    except KeyboardInterrupt:
        # Whoever reads along, such as tee, may have been interrupted, too.
        with contextlib.suppress(OSError):
            _say("")
    except BaseException:
        _need_no_more()
        story.stop()
        raise
    return complete, story.end()


def _wait_for_interrupt() -> NoReturn:
    # Blocked first: one that came just before signal.pause() would be waited for in vain.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.sigwait(SIGNALS)
    _need_no_more()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    raise KeyboardInterrupt


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _need_no_more()
    raise KeyboardInterrupt


def _need_no_more() -> None:
    """One signal is enough: what follows is the end that was asked for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _say(text: str, *, nl: bool = True) -> None:
    say_lines(text, nl=nl)
    sys.stdout.flush()
