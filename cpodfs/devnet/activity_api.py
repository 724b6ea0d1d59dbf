"""The Activity API: create, exec, results by long poll or as an event stream, state, usage.

Imports `activity`, `batch`, `pace`, `rest`, and `agreements` for whose activity it is. What is done at the
provider takes a way there and one back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from cpodfs.devnet.activity import TERMINATED, Activity
from cpodfs.devnet.agreements import Agreement
from cpodfs.devnet.batch import Batch, Reader, parse_script
from cpodfs.devnet.door import DOOR
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.rest import Problem, body_json, body_object, hold_s, text_field

_KEEP_ALIVE_S = 15.0
_LOOK_S = 1.0
"""How often a stream on which nothing comes is looked after."""
_DEFAULT_TIMEOUT_S = 5.0
_TIMEOUT_MARGIN_S = 1.0

Creator = Callable[[str], Awaitable[Activity]]
Ender = Callable[[Activity], Awaitable[None]]


class ActivityApi:
    """``create`` makes an activity for an agreement id, ``end`` ends and books one."""

    def __init__(
        self,
        activities: dict[str, tuple[Agreement, Activity]],
        create: Creator,
        end: Ender,
        pace: Pace,
    ) -> None:
        self._activities = activities
        self._pace = pace
        self._create = create
        self._end = end

    def routes(self, root: str = "/activity-api/v1") -> list[web.RouteDef]:
        one = f"{root}/activity/{{id}}"
        return [
            web.post(f"{root}/activity", self.create),
            web.delete(one, self.destroy),
            web.post(f"{one}/exec", self.exec),
            web.get(f"{one}/exec/{{batch}}", self.results),
            web.get(f"{one}/state", self.state),
            web.get(f"{one}/usage", self.usage),
            web.get(f"{one}/command", self.running),
        ]

    def _find(self, request: web.Request) -> tuple[Agreement, Activity]:
        key = request.match_info["id"]
        if key not in self._activities:
            raise Problem(500, "DAO error: Not found")
        agreement, activity = self._activities[key]
        return agreement, activity

    async def create(self, request: web.Request) -> web.Response:
        body = await body_json(request)
        key = text_field(body, "agreementId") if isinstance(body, dict) else body
        if not isinstance(key, str):
            raise Problem(400, "an agreement id is expected")
        async with self._pace.at_provider():
            activity = await self._create(key)
        if isinstance(body, dict):
            return web.json_response({"activityId": activity.id, "credentials": None})
        return web.json_response(activity.id)

    async def destroy(self, request: web.Request) -> web.Response:
        """Waits for the exe-unit; 408 when that takes longer than ``timeout`` (s; 5) and one more."""
        agreement, activity = self._find(request)
        timeout_s = hold_s(request, _DEFAULT_TIMEOUT_S) + _TIMEOUT_MARGIN_S
        ending = asyncio.ensure_future(self._destroy(agreement, activity))
        # It goes on in any case.
        done, _ = await asyncio.wait([ending], timeout=timeout_s)
        if not done:
            ending.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise Problem(408, "Timeout")
        ending.result()
        return web.json_response(None)

    async def _destroy(self, agreement: Agreement, activity: Activity) -> None:
        async with self._pace.at_provider():
            await agreement.provider.answers(None)
            if agreement.provider.gone:
                raise agreement.provider.unreachable("activity")
            await self._end(activity)

    async def exec(self, request: web.Request) -> web.Response:
        agreement, activity = self._find(request)
        commands = parse_script(text_field(await body_object(request), "text"))
        async with self._pace.at_provider():
            await agreement.provider.answers(_DEFAULT_TIMEOUT_S + _TIMEOUT_MARGIN_S)
            if agreement.provider.gone:
                raise activity.unreachable()
            batch = activity.send(commands)
        return web.json_response(batch.id)

    async def state(self, request: web.Request) -> web.Response:
        _agreement, activity = await self._asked(request)
        found = {
            "state": [activity.state, activity.pending],
            "reason": activity.reason,
            "errorMessage": activity.reason,
        }
        return web.json_response(found)

    async def _asked(self, request: web.Request) -> tuple[Agreement, Activity]:
        """An activity after its provider was asked; one that is over is known here."""
        agreement, activity = self._find(request)
        if activity.state != TERMINATED or agreement.provider.gone:
            async with self._pace.at_provider():
                await agreement.provider.answers(_DEFAULT_TIMEOUT_S + _TIMEOUT_MARGIN_S)
                if agreement.provider.gone:
                    raise agreement.provider.unreachable("activity")
        return agreement, activity

    async def usage(self, request: web.Request) -> web.Response:
        _agreement, activity = await self._asked(request)
        found = {"currentUsage": activity.usage, "timestamp": int(time.time())}
        return web.json_response(found)

    async def running(self, request: web.Request) -> web.Response:
        _agreement, activity = await self._asked(request)
        found = [
            dict([batch.commands[len(batch.results)]])
            for batch in activity.batches.values()
            if not batch.finished and len(batch.results) < len(batch.commands)
        ]
        if not found:
            raise Problem(404, f"Not found: No running command within activity: {activity.id}")
        return web.json_response(found)

    async def results(self, request: web.Request) -> web.StreamResponse:
        """All of a batch once it is done, or those that there are after ``timeout`` (s; 0)."""
        agreement, activity = self._find(request)
        key = request.match_info["batch"]
        if request.headers.get("Accept") == "text/event-stream":
            return await self._stream(request, agreement, activity)
        timeout_s = hold_s(request, 0.0)
        async with self._pace.at_provider():
            await agreement.provider.answers(timeout_s + _TIMEOUT_MARGIN_S)
            batch = _batch(agreement, activity, key)
            found = await batch.results_after(timeout_s)
            _batch(agreement, activity, key)
        return web.json_response(found)

    async def _stream(
        self, request: web.Request, agreement: Agreement, activity: Activity
    ) -> web.StreamResponse:
        """What a batch says from now on; afterwards signs of life for ever, as yagna does."""
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        await self._pace.cross()
        reader = Reader(self._pace.provider_latency_s)
        key = request.match_info["batch"]
        try:
            if not agreement.provider.gone and key in activity.batches:
                activity.batches[key].readers.add(reader)
                if activity.state == TERMINATED:
                    reader.end()
                await _pass_on(request, response, reader, agreement)
            while not _is_gone(request):
                await request.app[DOOR].thawed()
                await response.write(b":ping\n")
                await asyncio.sleep(_KEEP_ALIVE_S)
        except ConnectionError:
            pass  # the reader has what it wanted, or is gone
        finally:
            if key in activity.batches:
                activity.batches[key].readers.discard(reader)
        return response


def _batch(agreement: Agreement, activity: Activity, key: str) -> Batch:
    """A batch as its exe-unit knows it. Raises Problem."""
    if agreement.provider.gone or activity.state == TERMINATED:
        raise activity.unreachable()
    if key not in activity.batches:
        raise Problem(404, f"Not found: batch_id = {key}")
    return activity.batches[key]


async def _pass_on(
    request: web.Request, response: web.StreamResponse, reader: Reader, agreement: Agreement
) -> None:
    """Write events until there will be no more. Raises ConnectionError when the stream is over."""
    number = 0
    while True:
        events = await reader.arrived(_LOOK_S)
        await request.app[DOOR].thawed()
        said = b""
        for event in events:
            data = json.dumps(event, ensure_ascii=False)
            said += f"event: runtime\ndata: {data}\nid: {number}\n\n".encode()
            number += 1
        if said:
            await response.write(said)
        elif agreement.provider.gone or reader.lagged:
            _break_off(request)
        elif reader.ended:
            return
        if _is_gone(request):
            raise ConnectionResetError


def _break_off(request: web.Request) -> None:
    """End the connection without an end of the answer: the reader is to know that it is none."""
    if request.transport is not None:
        request.transport.abort()


def _is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()
