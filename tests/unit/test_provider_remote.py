"""An activity over a network that fails: who is waited for, and what is sent again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from ya_activity import ApiException
from yapapi.script import Script
from yapapi.script.command import Deploy, SendBytes, SendFile, Start

from cpodfs.runs import provider_remote
from cpodfs.runs.provider_errors import CommandFailed, LaneFailed, RunFailed, Vanished
from cpodfs.runs.provider_remote import Remote, Say

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RETRY_S", 0.01), ("SILENCE_S", 0.2), ("REFUSED_S", 0.05)):
        monkeypatch.setattr(provider_remote, name, value)


def refused(status: int, message: str) -> ApiException:
    error = ApiException(status=status, reason="no")
    error.body = json.dumps({"message": message})
    return error


GONE = "GSB error: Remote service at `/net/0x1` error: endpoint address not found"


class Yagna:
    """Plays yagna, its provider and `provider_remote.Yagna`: says what it is told to, then all is well."""

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []
        self.on_exec: Iterator[Any] = iter(())
        self.on_results: Iterator[Any] = iter(())
        self.state = ["New", None]
        self.waits = 0
        self.back_at = float("-inf")
        self.identity: Exception | None = None

    async def wait(self) -> None:
        self.waits += 1
        if self.identity is not None:
            raise self.identity

    async def call_exec(self, _activity: str, request: Any, **_: Any) -> str:
        self.sent.append(json.loads(request.text))
        error = next(self.on_exec, None)
        if error is not None:
            raise error
        return "batch"

    async def get_exec_batch_results(self, _activity: str, _batch: str, **_: Any) -> list[Any]:
        answer = next(self.on_results, None)
        if isinstance(answer, Exception):
            raise answer
        return [result("Ok")] if answer is None else answer

    async def get_raw_state(self) -> Any:
        return SimpleNamespace(state=self.state)

    def remote(self) -> Remote:
        context = SimpleNamespace(
            id="activity",
            _activity=SimpleNamespace(_api=self),
            get_raw_state=self.get_raw_state,
            emit=lambda *_, **__: None,
        )
        context.new_script = lambda: Script(context)  # type: ignore[arg-type]
        return Remote(context, self)  # type: ignore[arg-type]


def result(said: str, message: str | None = None, stderr: str | None = None) -> Any:
    return SimpleNamespace(
        result=said, message=message, stdout="said", stderr=stderr, is_batch_finished=True
    )


async def test_results_are_asked_for_until_they_are_there() -> None:
    yagna = Yagna()
    away = aiohttp.ServerDisconnectedError()
    yagna.on_results = iter([[], TimeoutError(), refused(408, "Timeout"), refused(500, GONE), away])
    (said,) = await yagna.remote().do([Say("watch")])
    assert (said.stdout, yagna.waits, len(yagna.sent)) == ("said", 4, 1)


async def test_a_failed_command_says_why() -> None:
    yagna = Yagna()
    yagna.on_results = iter([[result("Error", "exited with code 91", "x\ndid not arrive whole\n")]])
    with pytest.raises(CommandFailed, match="failed: exited with code 91: did not arrive whole"):
        await yagna.remote().do([Say("setup")])


async def test_a_batch_that_may_have_arrived_is_sent_again() -> None:
    """The first one is being carried out, so the provider is busy for a while."""
    yagna = Yagna()
    yagna.on_exec = iter([aiohttp.ServerDisconnectedError()])
    busy = [
        result("Error", "Local service error: State error: Busy: StatePair(Ready, Some(Ready))")
    ]
    yagna.on_results = iter([busy, busy])
    await yagna.remote().do([Say("watch")])
    assert len(yagna.sent) == 4


async def test_who_is_busy_without_our_doing_has_failed() -> None:
    yagna = Yagna()
    yagna.on_results = iter([[result("Error", "Busy: StatePair(Ready, Some(Ready))")]])
    with pytest.raises(CommandFailed, match="Busy"):
        await yagna.remote().do([Say("watch")])


@pytest.mark.parametrize(
    ("state", "second"),
    [
        (["New", None], ["deploy", "start", "run"]),
        (["Initialized", None], ["deploy", "start", "run"]),
        (["Initialized", "Deployed"], ["run"]),
        (["Ready", None], ["run"]),
    ],
)
async def test_an_activity_is_readied_once(state: list[str | None], second: list[str]) -> None:
    yagna = Yagna()
    yagna.state = state  # type: ignore[assignment]
    yagna.on_exec = iter([TimeoutError()])
    await yagna.remote().do([Deploy(), Start(), Say("setup")], opening=2)
    names = [[next(iter(command)) for command in batch] for batch in yagna.sent]
    assert names == [["deploy", "start", "run"], second]


async def test_files_are_offered_when_yagna_is_back() -> None:
    """gftp asks yagna, too; a file that was offered already is not offered again."""
    yagna, offered = Yagna(), []
    words = "(-32000, 'Called service `/local/identity/Get` is unavailable')"
    on_upload = iter([None, OSError(words), OSError(words)])

    async def upload(what: Any) -> Any:
        error = next(on_upload, None)
        if error is not None:
            raise error
        offered.append(str(what))
        return SimpleNamespace(download_url="gftp://x")

    async def release(_source: Any) -> None:
        return

    remote = yagna.remote()
    remote._context._storage = SimpleNamespace(
        upload_bytes=upload, upload_file=upload, release_source=release
    )
    await remote.do([SendBytes(b"a", "/golem/a"), SendFile("b", "/golem/b")])
    assert (offered, yagna.waits) == (["b'a'", "b"], 2)


async def test_a_provider_that_yagna_does_not_find_has_vanished() -> None:
    yagna = Yagna()
    yagna.on_results = iter([refused(500, GONE)] * 1000)
    with pytest.raises(Vanished, match="provider vanished: yagna said 500"):
        await yagna.remote().do([Say("watch")])


async def test_a_yagna_that_has_just_come_back_may_not_find_it_yet() -> None:
    yagna = Yagna()
    remote = yagna.remote()
    yagna.back_at = asyncio.get_running_loop().time()
    yagna.on_results = iter([refused(500, GONE)] * 10)
    await remote.do([Say("watch")])
    yagna.on_results = iter([refused(500, GONE)] * 1000)
    with pytest.raises(Vanished):
        await remote.do([Say("watch")])


async def test_silence_of_the_provider_is_told_from_yagnas() -> None:
    yagna = Yagna()
    yagna.on_results = iter([refused(408, "Timeout")] * 1000)
    with pytest.raises(Vanished):
        await yagna.remote().do([Say("watch")])
    yagna.identity = RunFailed("another yagna is there")
    yagna.on_results = iter([TimeoutError()])
    with pytest.raises(RunFailed, match="another yagna"):
        await yagna.remote().do([Say("watch")])


@pytest.mark.parametrize(
    ("status", "message"), [(404, "no"), (410, "over"), (500, "DAO error: Not found")]
)
async def test_what_yagna_does_not_know_is_lost(status: int, message: str) -> None:
    yagna = Yagna()
    yagna.on_results = iter([refused(status, message)])
    with pytest.raises(LaneFailed, match=f"activity lost: yagna said {status}"):
        await yagna.remote().do([Say("watch")])
    yagna.on_results = iter([refused(status, message)])
    yagna.identity = RunFailed("another yagna is there")
    with pytest.raises(RunFailed, match="another yagna"):
        await yagna.remote().do([Say("watch")])


async def test_a_refusal_is_passed_on() -> None:
    yagna = Yagna()
    yagna.on_exec = iter([refused(401, "key")])
    with pytest.raises(ApiException):
        await yagna.remote().do([Say("watch")])
