"""What commands print of text that is not ours."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from cpodfs.cli.mount import LOG_FORMAT, _Lines
from cpodfs.cli.shown import Passed, as_json
from cpodfs.cli.tables import Table
from cpodfs.words import cost, line, printable

HOSTILE = "\x1b[2J\x07\x9b31m\x7f\u202e\u2066\u2028\udc80\r\x00"


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        *((0.000123456789012, "0.0001235"), (1.2345678e-9, "0.000000001235"), (12345.678, "12350")),
        *((0.1, "0.1"), (0, "0"), (1, "1"), (2.0, "2"), (0.30000000000000004, "0.3")),
        *((None, ""), ("1", ""), (True, ""), (float("nan"), ""), (float("inf"), "")),
    ],
)
def test_a_cost_has_four_digits_at_most(amount: object, shown: str) -> None:
    assert cost(amount) == shown


class Terminal(io.TextIOWrapper):
    """A stream that is, or is not, a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="strict", newline="")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def got(self) -> bytes:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


def passed(*pieces: bytes, terminal: bool = True) -> bytes:
    target = Terminal(terminal=terminal)
    output = Passed(target)
    for piece in pieces:
        output.write(piece)
    output.end()
    return target.got()


def test_nothing_but_lines_has_an_effect() -> None:
    shown = printable(f"a{HOSTILE}\nb")
    assert shown == r"a\x1b[2J\x07\x9b31m\x7f\u202e\u2066\u2028\udc80\r\x00" + "\nb"
    assert line(f"{HOSTILE}\nb").isprintable()
    assert line("ünï [bold]語") == "ünï [bold]語"


def test_a_terminal_gets_colours_and_nothing_else() -> None:
    assert passed(b"a\tb\rc\x1b[1;31mred\n") == b"a\tb\rc\x1b[1;31mred\n\x1b[0m"
    assert passed("\x1b]8;;http://x\x1b\\link\x9b2J".encode()) == (
        rb"\x1b]8;;http://x\x1b\link\x9b2J"
    )
    assert passed(b"\x1b[2J\xff\xe2\x80\xae") == rb"\x1b[2J\xff\u202e"


def test_what_is_in_two_pieces_is_seen_as_one() -> None:
    assert passed(b"a\x1b", b"[3", b"1mb\xc3", b"\xbc") == "a\x1b[31mbü\x1b[0m".encode()
    assert passed(b"a\x1b[3") == rb"a\x1b[3"
    assert passed(b"a\x1b[" + b"1" * 100, b"m") == rb"a\x1b[" + b"1" * 100 + b"m"


def test_a_file_gets_the_bytes() -> None:
    data = bytes(range(256))
    assert passed(data[:100], data[100:], terminal=False) == data


def test_a_table_has_text_and_no_markup() -> None:
    table = Table(box=None, show_header=False)
    table.add_row("[link=http://x]pods[/link]", f"{HOSTILE}\n:smile: [red]x")
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True).print(table)
    (shown,) = out.getvalue().splitlines()
    assert "[link=http://x]pods[/link]" in shown
    assert ":smile: [red]x" in shown
    assert "\x1b]8" not in shown
    assert all(c.isprintable() for c in shown.replace("\x1b[0m", ""))


def test_json_is_harmless() -> None:
    assert as_json([HOSTILE]).isprintable()


def test_a_name_cannot_forge_a_line_of_the_log() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines(LOG_FORMAT))
    log = logging.Logger("test")
    log.addHandler(handler)
    forged = "x\n2026-01-01 00:00:00,000 I cpodfs.fs pod trusted\x1b[2J"
    log.warning("conflict: %s", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        log.exception("failed")
    lines = stream.getvalue().splitlines()
    assert [each for each in lines if "pod trusted" in each and each.startswith("20")] == lines[:1]
    assert all(each.isprintable() for each in lines)
