"""Unmodified yapapi scripts, as processes of their own, against the local market."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from market_tools import ONE, THREE, Requestor, Served, processes_with, served

from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import ProviderSpec

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# What yapapi says of a stream that began before it listened is nothing: a machine takes long enough.
PACES = [
    pytest.param(Pace(vm=True, offer_delay_s=0), id="near"),
    pytest.param(Pace(provider_latency_s=0.15, vm=True, offer_delay_s=0.1), id="far"),
]
LATENCIES = [
    pytest.param(Pace(offer_delay_s=0), id="near"),
    pytest.param(Pace(provider_latency_s=0.15, offer_delay_s=0.1), id="far"),
]


def assert_settled(market: Served, agreements: int) -> None:
    rows = market.ledger()
    assert len(rows) == agreements
    for row in rows:
        assert row.state == "Terminated"
        assert row.cost == row.invoiced == row.paid
    assert list((market.folder / "gftp").iterdir()) == []
    assert list(market.market_dir.glob("providers/*/*")) == []


@pytest.mark.parametrize("pace", LATENCIES)
async def test_hello_world(tmp_path: Path, pace: Pace) -> None:
    async with served(tmp_path, pace=pace, providers=ONE) as market:
        # Nothing on standard error: no library's warning either, on no version of Python.
        assert await market.ended_script("hello.py") == ("Hello, work!\n", "", 0)
        assert_settled(market, agreements=1)


@pytest.mark.parametrize("pace", LATENCIES)
async def test_many_tasks_on_three_providers(tmp_path: Path, pace: Pace) -> None:
    words = [f"word{number}\n" for number in range(1, 136)]
    (tmp_path / "words.txt").write_text("".join(words))
    async with served(tmp_path, pace=pace, providers=THREE) as market:
        found = json.loads(await market.run_script("crack.py", "3", str(tmp_path)))
        assert found["total"] == 135
        assert found["providers"] == ["a", "b", "c"]
        assert list(found["counts"].values()).count(10) == 13
        parts = sorted(tmp_path.glob("part-*.txt"))
        assert "".join(part.read_text() for part in parts) == "".join(words).upper()
        assert_settled(market, agreements=4)


@pytest.mark.parametrize("pace", LATENCIES)
async def test_failed_command_is_retried(tmp_path: Path, pace: Pace) -> None:
    async with served(tmp_path, pace=pace, providers=THREE) as market:
        found = json.loads(await market.run_script("retry.py"))
        assert found["result"] == "fine\n"
        [failure] = found["failed"]
        assert failure == {"message": "ExeScript command exited with code 3", "stderr": "broken\n"}
        assert_settled(market, agreements=2)


@pytest.mark.parametrize("pace", PACES)
async def test_streamed_output(tmp_path: Path, pace: Pace) -> None:
    async with served(tmp_path, pace=pace, providers=ONE) as market:
        seen = json.loads(await market.run_script("stream.py"))
        output = [(kind, text) for kind, text, _at in seen if "Std" in kind]
        assert output == [
            *(("CommandStdOut", f"line {number}\n") for number in (1, 2, 3)),
            ("CommandStdErr", "grüße\n"),
        ]
        times = [at for kind, _text, at in seen if "Std" in kind]
        assert times[2] - times[0] > 0.1
        assert "CommandProgress" in [kind for kind, _text, _at in seen]
        assert_settled(market, agreements=1)


@pytest.mark.parametrize("pace", LATENCIES)
async def test_a_service_is_asked_through_the_vpn(tmp_path: Path, pace: Pace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with served(tmp_path, pace=pace, providers=ONE) as market:
        found = json.loads(await market.run_script("http_proxy.py", str(port)))
        assert found == [[200, "hello\n"], 404]
        assert_settled(market, agreements=1)


@pytest.mark.parametrize("pace", PACES)
async def test_killed_requestor_leaves_nothing(tmp_path: Path, pace: Pace) -> None:
    # Another run of the tests on this machine has another.
    mark = f"98705.{os.getpid()}"
    pace = replace(pace, accept_timeout_s=3)
    eager = (ProviderSpec("eager", debit_note_interval_s=1),)
    async with served(tmp_path, pace=pace, providers=eager) as market:
        process = await market.start_script("hang.py", mark)
        assert process.stdout
        async for line in process.stdout:
            if line == b"CommandStdOut\n":
                break
        assert processes_with(mark)
        process.kill()
        await process.wait()
        await Requestor(market).agreement_event("AgreementTerminatedEvent")
        assert processes_with(mark) == []
        [row] = market.ledger()
        assert row.state == "Terminated"
        assert "DebitNote" in row.reason
