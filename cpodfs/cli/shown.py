"""What commands print: all text that is not ours goes through here.

Imports words and click. Names, what servers say and what programs write could draw over what is on
a terminal, forge lines, or make links. In our own sentences and tables (`tables`) they are shown
with escapes, wherever these go; for programs there is ``--json``. A program's output (`Passed`) is
made harmless on a terminal only: a file or a pipe gets its bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, TextIO

import click

from cpodfs import words

_SGR = re.compile("(\x1b\\[[0-9;:]*m)")
"""Colours and the like: the only escape sequences that neither move nor answer anything."""
_BEGUN = re.compile("\x1b(\\[[0-9;:]{0,60})?$")
"""One that may go on in the next piece."""
_PLAIN = "\x1b[0m"


def say(text: str, *, err: bool = False) -> None:
    """Print one line, whatever is in it."""
    click.echo(words.line(text), err=err)


def say_lines(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print what may have several lines."""
    click.echo(words.printable(text), err=err, nl=nl)


def as_json(value: Any, indent: int | None = None) -> str:
    """For programs, and harmless all the same: of the controls JSON leaves only DEL as it is."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")


class Passed:
    """A program's output on its way to one of our streams. On a terminal lines, tabs, returns and
    colours have an effect, nothing else; elsewhere the bytes are passed on as they are."""

    def __init__(self, target: TextIO) -> None:
        self._target = target
        self._is_terminal = target.isatty()
        self._decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
        self._held = ""
        self._coloured = False

    def write(self, data: bytes) -> None:
        if self._is_terminal:
            self._show(self._decode(data))
        else:
            self._write(data)

    def end(self) -> None:
        """Nothing more will come; what follows is not in the program's colours."""
        if self._is_terminal:
            self._show(self._decode(b"", True), last=True)

    def _write(self, data: bytes) -> None:
        self._target.buffer.write(data)
        self._target.buffer.flush()

    def _show(self, text: str, *, last: bool = False) -> None:
        text = self._held + text
        begun = None if last else _BEGUN.search(text)
        self._held = "" if begun is None else begun[0]
        parts = _SGR.split(text[: len(text) - len(self._held)])
        self._coloured = self._coloured or len(parts) > 1
        parts[::2] = map(_harmless, parts[::2])
        if last and self._coloured:
            parts.append(_PLAIN)
        self._write("".join(parts).encode(self._target.encoding, "backslashreplace"))


def _harmless(text: str) -> str:
    return "".join(c if c in "\t\r" else words.printable(c) for c in text)
