"""What runs left open at the market because somebody did not answer: ended and paid later.

Imports `state` and `launch`; trio and httpx. Used by `manager` only. A run that owes is over for its
user; its record says so by a ``golem.phase`` that is not "over", and is brought up to date here.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import trio

from cpodfs.runs import state
from cpodfs.runs.launch import end_agreements

if TYPE_CHECKING:
    from cpodfs.runs.state import Record

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""How often a yagna that is away is looked for."""
PAUSES_S = (5.0, 15.0, 30.0, 60.0, 300.0, 900.0)
"""Between tries with a yagna that answers; the last one again and again."""
REMEMBERED_S = 24 * 3600.0
"""A driver that starts takes up the debts of runs that ended in this time before; older ones are
given up: yagna releases by itself what was set aside for them."""
_ANSWER_S = 5.0
_DEFAULT_URL = "http://127.0.0.1:7465"


def owes(record: Record) -> bool:
    """Whether a run that is over may have left agreements or invoices open."""
    golem = record.get("golem")
    return (
        record["state"] in state.ENDED and isinstance(golem, dict) and golem.get("phase") != "over"
    )


def is_recent(folder: Path) -> bool:
    """Whether a run's record was written within `REMEMBERED_S`. Raises OSError."""
    return (folder / state.RECORD_FILE).stat().st_mtime > time.time() - REMEMBERED_S


async def settle(
    folder: Path,
    environment: Callable[[], Mapping[str, str]],
    publish: Callable[[Path, int], Awaitable[None]],
) -> None:
    """Try until a run owes nothing, for `REMEMBERED_S` at most.

    ``environment``: as for `manager.RunManager`. ``publish(folder, lock)`` copies the record that
    has changed to the pod. Never raises but when cancelled.
    """
    tries, pause_s = 0, PAUSES_S[0]
    deadline = time.time() + REMEMBERED_S
    while True:
        await trio.sleep(pause_s)
        last = time.time() >= deadline
        try:
            if not last and not await _is_there(await trio.to_thread.run_sync(environment)):
                tries, pause_s = 0, LOOK_S
                continue
            if await _try(folder, environment, publish, last=last):
                return
        except Exception:
            # Of any kind: the settings may lack the app-key, the record be half written.
            log.exception("agreements not ended folder=%s", folder)
        if last:
            break
        pause_s = PAUSES_S[min(tries, len(PAUSES_S) - 1)]
        tries += 1
    log.error("agreements may be open: nobody answered in time folder=%s", folder)


async def _is_there(environment: Mapping[str, str]) -> bool:
    """Whether yagna answers: a try with one that does not is a process for nothing."""
    url = environment.get("YAGNA_API_URL", _DEFAULT_URL).rstrip("/")
    key = {"Authorization": f"Bearer {environment.get('YAGNA_APPKEY', '')}"}
    try:
        async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False) as client:
            answer = await client.get(f"{url}/me", headers=key)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK


async def _try(
    folder: Path,
    environment: Callable[[], Mapping[str, str]],
    publish: Callable[[Path, int], Awaitable[None]],
    *,
    last: bool,
) -> bool:
    try:
        lock = state.take_lock(folder)
    except FileNotFoundError:
        # Too old to be remembered.
        return True
    if lock is None:
        return False
    try:
        record = state.read_record(folder)
        if record is None or not owes(record):
            return True
        extra = await trio.to_thread.run_sync(environment)
        before = copy.deepcopy(record)
        # Abandoned when the driver goes: it is a process of its own, and to end twice is no harm.
        await trio.to_thread.run_sync(
            partial(end_agreements, last=last), folder, record, extra, abandon_on_cancel=True
        )
        if record != before:
            await trio.to_thread.run_sync(partial(state.write_record, folder, record, durable=True))
            await publish(folder, lock)
        if owes(record):
            return False
        log.info("settled late pod=%r run=%s", record["pod"], record["id"])
        return True
    finally:
        os.close(lock)
