"""JSON lines between a provider run's process and the supervisor."""

from __future__ import annotations

import base64
import io
import json
import os
from decimal import Decimal
from pathlib import Path

import pytest

from cpodfs.runs import provider_link
from cpodfs.runs.provider_bills import Bills
from cpodfs.runs.provider_books import Books
from cpodfs.runs.provider_link import Link
from cpodfs.runs.provider_status import Hired, Reporter, Status
from cpodfs.runs.stream import Spool

LIMIT = 50_000

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Line:
    """A pipe with a link at its end, and what the link made of it."""

    def __init__(self, folder: Path) -> None:
        reader, self.pipe = os.pipe()
        self.paths = {name: folder / name for name in ("stdout", "stderr")}
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        spools = {
            name: Spool(os.open(path, flags, 0o600), limit=LIMIT)
            for name, path in self.paths.items()
        }
        self.statuses: list[dict] = []
        self.link = Link(reader, spools, self.statuses.append)

    def say(self, data: bytes) -> None:
        os.write(self.pipe, data)
        while self.link.pump():
            pass

    def text(self, name: str) -> str:
        return self.paths[name].read_text()


def said_line(data: bytes) -> bytes:
    message = {"log": "stdout", "data": base64.b64encode(data).decode()}
    return json.dumps(message).encode() + b"\n"


def test_lines_become_logs_status_and_end(tmp_path: Path) -> None:
    line = Line(tmp_path)
    said = said_line("grüße\n".encode())
    line.say(said[:20])
    assert line.text("stdout") == ""
    line.say(said[20:] + b'{"status": {"phase": "running"}}\n')
    assert (line.text("stdout"), line.statuses) == ("grüße\n", [{"phase": "running"}])
    line.say(b'{"end": {"error": null, "exit_code": 0}}\n')
    assert line.link.end == {"error": None, "exit_code": 0}
    os.close(line.pipe)
    assert line.link.pump() is None


@pytest.mark.parametrize(
    "said",
    [
        b"Traceback",
        b"[]",
        b'{"log": "passwd", "data": "eA=="}',
        b'{"log": "stdout", "data": 1}',
        b"{}",
        b'{"status": 1}',
    ],
)
def test_what_is_not_understood_is_logged(tmp_path: Path, said: bytes) -> None:
    line = Line(tmp_path)
    line.say(said + b"\n")
    assert line.text("stderr") == said.decode() + "\n"
    assert line.statuses == []


def test_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.say(b"last words")
    os.close(line.pipe)
    while line.link.pump():
        pass
    assert line.text("stderr") == "last words\n"


def test_what_a_provider_prints_has_the_limit_of_every_log(tmp_path: Path) -> None:
    line = Line(tmp_path)
    for _ in range(3):
        line.say(said_line(b"x" * 20_000))
    assert line.text("stdout") == "x" * LIMIT
    assert not line.link.full


def test_a_full_disk_does_not_hold_the_process_up(tmp_path: Path) -> None:
    """It has a timeout to keep and agreements to end: what it prints meanwhile may be lost."""
    line = Line(tmp_path)
    spool = line.link._spools["stdout"]
    there, spool.fd = spool.fd, os.open("/dev/full", os.O_WRONLY)
    text = said_line(b"x" * 20_000)
    for _ in range(2):
        line.say(text)
    line.say(b'{"status": {"phase": "over"}}\n')
    assert line.statuses == [{"phase": "over"}]
    assert (len(spool.pending), spool.lost) == (40_000, 0)
    spool.pending = b"y" * (1 << 21)
    line.say(text)
    assert spool.lost == 20_000
    os.close(spool.fd)
    spool.fd, spool.pending = there, b"y"
    line.say(text)
    assert line.text("stdout")[:2] == "yx"


async def test_the_reporter_speaks_what_the_link_understands(tmp_path: Path) -> None:
    status = Status(Decimal("0.5"))
    status.hired["a"] = Hired("one", "0x1", "a", spent=Decimal("0.1"), accepted=Decimal("0.1"))
    out = io.BytesIO()
    reporter = Reporter(status, out)
    reporter.log("stdout", b"x" * 40000)
    reporter.end("why", 125)
    line = Line(tmp_path)
    line.say(out.getvalue()[:30000])
    line.say(out.getvalue()[30000:])
    assert line.text("stdout") == "x" * 40000
    assert line.link.end == {"error": "why", "exit_code": 125}
    (shown,) = line.statuses
    assert (shown["spent"], shown["accepted"], shown["budget"]) == (0.1, 0.1, 0.5)
    assert shown["providers"][0]["name"] == "one"
    json.dumps(shown)


async def test_whose_invoice_is_missing() -> None:
    status = Status(Decimal(1))
    books = Books(Reporter(status, io.BytesIO()), Bills())
    assert await books.settle(lambda: 0.1) == []
    status.hired["idle"] = Hired("idle", "0x0", "idle")
    status.hired["paid"] = Hired("paid", "0x1", "paid", activity="1", paid=True)
    assert await books.settle(lambda: 0.1) == []
    status.hired["owed"] = Hired("owed", "0x2", "owed", activity="2")
    status.hired["gone"] = Hired("gone", "0x3", "gone", "vanished", activity="3")
    assert await books.settle(lambda: 0.1) == ["no invoice from owed yet"]


async def test_a_supervisor_that_is_gone_is_told_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    unheard: list[bool] = []
    with os.fdopen(writer, "wb", buffering=0) as out:
        reporter = Reporter(Status(Decimal(1)), out)
        reporter.on_unheard = lambda: unheard.append(True)
        reporter.note("x")
        reporter.tell()
    assert unheard == [True, True]


def status_of(**hired: object) -> dict:
    one = {"agreement": "a", "activity": "1", "agreement_state": "approved", "paid": False}
    return {"phase": "running", "allocation": None, "providers": [one | hired]}


@pytest.mark.parametrize(
    ("hired", "tidied"),
    [
        ({}, True),
        ({"activity": None}, True),
        ({"agreement_state": "terminated"}, True),
        ({"agreement_state": "terminated", "paid": True}, False),
        ({"agreement_state": "terminated", "activity": None}, False),
        ({"agreement_state": "vanished"}, True),
        ({"agreement_state": "expired"}, False),
        ({"agreement_state": "terminated", "refused": True}, False),
    ],
)
def test_what_is_to_be_ended_or_paid(hired: dict, tidied: bool) -> None:
    (one,) = status_of(**hired)["providers"]
    assert (provider_link.is_open(one) or provider_link.is_owed(one)) == tidied
