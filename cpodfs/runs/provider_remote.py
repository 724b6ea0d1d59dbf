"""An activity that is spoken to over a network that fails: batches by their results, with patience.

asyncio, in the provider run's own process; imports yapapi and `provider_errors`. yagna's event
stream has no memory, so nothing is read from it: the results of a batch lose nothing, and can be
asked for again. Two silences are told apart. A yagna that does not answer is restarted, or frozen:
it is waited for. A provider that yagna, which answers, does not reach has vanished after a while.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import aiohttp
from ya_activity import models
from yapapi.script.capture import CaptureContext
from yapapi.script.command import Command, Run

from cpodfs.runs.provider_errors import (
    CommandFailed,
    LaneFailed,
    RunFailed,
    Vanished,
    describe,
    is_gone,
    is_lost,
    is_silence,
)
from cpodfs.runs.provider_script import HELPER

SILENCE_S = 30.0
"""A provider that yagna cannot reach for so long has vanished."""
REFUSED_S = 3.0
"""Or one of whom yagna says for so long that it is not to be found."""
ROUTES_S = 60.0
"""A yagna that has just come back may not know yet where its providers are."""
RETRY_S = 0.5
PROBE_S = 3.0
_HOLD_S = 5.0
"""yagna holds a call for results until the batch's last command is done, even if an earlier one has
failed and there will be no more: so not for long."""
_ANSWER_S = 15.0
"""Beyond what a call may take for its own reasons."""

_GFTP_S = 60.0
_GFTP_WITHOUT_YAGNA = "is unavailable"
"""Called service `/local/identity/Get` is unavailable": it connects again by itself."""

_T = TypeVar("_T")


class Yagna:
    """Whether yagna is there, and is the one that the run began with.

    ``session``: aiohttp's, with the app-key. ``root``: yagna's URL. ``say`` is told when it is away,
    and when it is back.
    """

    def __init__(
        self, session: aiohttp.ClientSession, root: str, say: Callable[[str], None]
    ) -> None:
        self._session = session
        self._root = root
        self._say = say
        self._looking = asyncio.Lock()
        self.identity: str | None = None
        self.back_at = float("-inf")
        """When it came back last, by the loop's clock."""

    async def look(self) -> str | None:
        """Its identity; None when it does not answer within `PROBE_S`."""
        try:
            async with asyncio.timeout(PROBE_S), self._session.get(f"{self._root}/me") as answer:
                if answer.status != 200:
                    return None
                identity = (await answer.json()).get("identity")
                return identity if isinstance(identity, str) else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AttributeError):
            return None

    async def is_same(self) -> bool:
        """Whether the yagna that answers now is the one that the run began with: what another one does
        not know proves nothing."""
        return await self.look() == self.identity

    async def wait(self) -> None:
        """Return when it is there. Raises RunFailed for another yagna."""
        async with self._looking:
            away = False
            while (identity := await self.look()) is None:
                if not away:
                    self._say("yagna does not answer; waiting for it")
                away = True
                await asyncio.sleep(RETRY_S)
            if away:
                self.back_at = asyncio.get_running_loop().time()
                self._say("yagna answers again")
        if identity != self.identity:
            raise RunFailed(f"another yagna is there: {identity}, not {self.identity}")


class Say(Run):  # type: ignore[misc]
    """A call of our script in the container."""

    def __init__(self, *words: str) -> None:
        whole = CaptureContext.build(mode="all")
        super().__init__("/bin/sh", HELPER, *words, stdout=whole, stderr=whole)


class Remote:
    """One activity; ``context`` is yapapi's. Its calls wait for a yagna that is away."""

    def __init__(self, context: Any, yagna: Yagna) -> None:
        self._context = context
        self._yagna = yagna
        self._api = context._activity._api

    @property
    def id(self) -> str:
        return str(self._context.id)

    async def do(self, commands: Sequence[Command], *, opening: int = 0) -> list[Any]:
        """Carry out a batch; the results of its commands, each with stdout, stderr (text or None).

        It may be sent again when its acknowledgement was lost, so the commands must be such that
        it does no harm; but for the first ``opening`` of them, which ready a new activity.
        Raises LaneFailed: CommandFailed, Vanished, or the activity is lost.
        """
        script = self._context.new_script()
        for command in commands:
            script.add(command)
        for command in commands:
            await self._published(command)
        words, again = script._evaluate(), False
        while True:
            batch, again = await self._send(words, opening, again=again)
            results = await self._results(batch, len(commands))
            last = results[-1]
            if str(last.result).lower() == "ok":
                break
            if not (again and _is_busy(last.message)):
                raise CommandFailed(last.message, last.stderr)
            # What was sent the first time is being carried out: one batch at a time.
            await asyncio.sleep(RETRY_S)
        await script._after()
        return results

    async def _published(self, command: Command) -> None:
        """Have gftp offer the command's file, which needs yagna for it."""
        while True:
            try:
                async with asyncio.timeout(_GFTP_S):
                    await command.before()
            except Exception as error:
                if _GFTP_WITHOUT_YAGNA not in str(error):
                    raise
            else:
                return
            await asyncio.sleep(RETRY_S)
            await self._yagna.wait()

    async def _send(self, commands: list[Any], opening: int, *, again: bool) -> tuple[str, bool]:
        """The batch's id, and whether it may have been sent before."""

        async def send() -> tuple[str, bool]:
            nonlocal again
            left = commands
            if opening and again and await self._is_begun():
                left = commands[opening:]
            before, again = again, True
            request = models.ExeScriptRequest(text=json.dumps(left))
            batch = await self._api.call_exec(self.id, request, _request_timeout=_ANSWER_S)
            return str(batch), before

        return await self.patiently(send)

    async def _is_begun(self) -> bool:
        async with asyncio.timeout(_ANSWER_S):
            state = await self._context.get_raw_state()
        now, coming = [*state.state, None][:2]
        return coming is not None or now not in ("New", "Initialized")

    async def _results(self, batch: str, count: int) -> list[Any]:
        async def ask() -> list[Any]:
            found: list[Any] = await self._api.get_exec_batch_results(
                self.id, batch, timeout=_HOLD_S, _request_timeout=_HOLD_S + _ANSWER_S
            )
            return found

        while True:
            begun = asyncio.get_running_loop().time()
            results = await self.patiently(ask)
            if results and (results[-1].is_batch_finished or len(results) >= count):
                return results
            if asyncio.get_running_loop().time() - begun < RETRY_S:
                # Not every yagna holds the call.
                await asyncio.sleep(RETRY_S)

    async def patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """What a call says, made again as long as it is not known whether the provider is there.

        Raises Vanished when it is not, LaneFailed when yagna knows nothing of the activity, RunFailed
        for another yagna; other refusals of yagna's unchanged.
        """
        loop = asyncio.get_running_loop()
        begun, refused = loop.time(), None
        while True:
            try:
                answer = await call()
            except Exception as error:
                if is_lost(error):
                    await self._yagna.wait()
                    raise LaneFailed(f"activity lost: {describe(error)}") from None
                if not is_silence(error):
                    raise
                why = error
            else:
                return answer
            await self._yagna.wait()
            now, back_at = loop.time(), self._yagna.back_at
            refused = (refused or now) if is_gone(why) else None
            # With routes to be found anew, the first call may take that long by itself.
            silent = now - max(begun, back_at + SILENCE_S) > SILENCE_S
            gone = refused is not None and now - refused >= REFUSED_S and now - back_at > ROUTES_S
            if silent or gone:
                raise Vanished(f"provider vanished: {describe(why)}")
            await asyncio.sleep(RETRY_S)


def _is_busy(message: Any) -> bool:
    return "Busy" in str(message)
