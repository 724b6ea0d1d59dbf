from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, object]]:
    """An ``anyio_backend``: trio on a clock that jumps over every wait, so that retries take no time.

    It would jump over what threads do as well, so there are none.
    """

    async def run_sync(work: Callable[..., Any], *arguments: Any, **_options: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}
