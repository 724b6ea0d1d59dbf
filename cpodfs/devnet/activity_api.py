"""The Activity API: create, exec, results by long poll or as an event stream, state, usage.

Imports `activity`, `rest`, and `agreements` for whose activity it is. Every call counts as a sign
of life of the agreement's requestor; an open event stream does so as long as it can be written.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from aiohttp import web

from cpodfs.devnet.activity import Activity, Batch, parse_script
from cpodfs.devnet.agreements import Agreement
from cpodfs.devnet.rest import Problem, body_json, body_object, hold_s, text_field

_KEEP_ALIVE_S = 10.0
_DEFAULT_HOLD_S = 5.0

Creator = Callable[[str], Awaitable[Activity]]
Ender = Callable[[Activity], Awaitable[None]]


class ActivityApi:
    """``create`` makes an activity for an agreement id, ``end`` ends and books one."""

    def __init__(
        self, activities: dict[str, tuple[Agreement, Activity]], create: Creator, end: Ender
    ) -> None:
        self._activities = activities
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
            raise Problem(404, f"activity {key} is not known")
        agreement, activity = self._activities[key]
        agreement.seen_now()
        _check_there(agreement)
        return agreement, activity

    async def create(self, request: web.Request) -> web.Response:
        body = await body_json(request)
        key = text_field(body, "agreementId") if isinstance(body, dict) else body
        if not isinstance(key, str):
            raise Problem(400, "an agreement id is expected")
        activity = await self._create(key)
        if isinstance(body, dict):
            found = {"activityId": activity.id, "credentials": None}
            return web.json_response(found, status=201)
        return web.json_response(activity.id, status=201)

    async def destroy(self, request: web.Request) -> web.Response:
        _agreement, activity = self._find(request)
        await self._end(activity)
        return web.json_response(None)

    async def exec(self, request: web.Request) -> web.Response:
        _agreement, activity = self._find(request)
        commands = parse_script(text_field(await body_object(request), "text"))
        return web.json_response(activity.send(commands).id)

    async def state(self, request: web.Request) -> web.Response:
        _agreement, activity = self._find(request)
        found = {
            "state": [activity.state, None],
            "reason": activity.reason,
            "errorMessage": activity.reason,
        }
        return web.json_response(found)

    async def usage(self, request: web.Request) -> web.Response:
        _agreement, activity = self._find(request)
        found = {"currentUsage": activity.usage, "timestamp": int(activity.duration_s)}
        return web.json_response(found)

    async def running(self, request: web.Request) -> web.Response:
        _agreement, activity = self._find(request)
        return web.json_response(
            [
                {"batchId": batch.id, "command": batch.commands[len(batch.results)][0]}
                for batch in activity.batches.values()
                if not batch.finished
            ]
        )

    async def results(self, request: web.Request) -> web.StreamResponse:
        agreement, activity = self._find(request)
        batch = activity.batches.get(request.match_info["batch"])
        if batch is None:
            raise Problem(404, f"batch {request.match_info['batch']} is not known")
        if "text/event-stream" in request.headers.get("Accept", ""):
            return await _stream(request, agreement, batch)
        timeout_s = hold_s(request, _DEFAULT_HOLD_S)
        agreement.polls += 1
        try:
            await batch.changed.until(
                lambda: batch.finished or len(batch.results) > batch.delivered, timeout_s
            )
        finally:
            agreement.polls -= 1
            agreement.seen_now()
        _check_there(agreement)
        batch.delivered = len(batch.results)
        return web.json_response(batch.results)


def _check_there(agreement: Agreement) -> None:
    """Raise what yagna says of a provider that it cannot reach."""
    if agreement.provider.gone:
        raise Problem(
            500, f"GSB error: endpoint address not found: /net/{agreement.provider.node_id}"
        )


async def _stream(request: web.Request, agreement: Agreement, batch: Batch) -> web.StreamResponse:
    """All events of a batch from the one after ``Last-Event-Id`` on, until it has finished."""
    last = request.headers.get("Last-Event-Id", "")
    sent = int(last) if last.isdecimal() else 0
    response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
    response.content_type = "text/event-stream"
    await response.prepare(request)
    reader = object()
    try:
        while True:
            if agreement.provider.gone:
                raise ConnectionResetError
            for number, event in [kept for kept in batch.events if kept[0] > sent]:
                data = json.dumps(event, ensure_ascii=False)
                await response.write(f"event: runtime\nid: {number}\ndata: {data}\n\n".encode())
                sent = batch.readers[reader] = number
                batch.read.fire()
            agreement.seen_now()
            if batch.finished and sent == batch.emitted:
                return response
            if not await batch.changed.until(_more_than(batch, sent), _KEEP_ALIVE_S):
                await response.write(b": still there\n\n")
    except ConnectionError:
        return response  # the reader has what it wanted, or is gone
    finally:
        batch.readers.pop(reader, None)
        batch.read.fire()


def _more_than(batch: Batch, sent: int) -> Callable[[], bool]:
    return lambda: batch.emitted > sent
