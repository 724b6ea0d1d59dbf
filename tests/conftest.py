"""What tests need of the machine, and in which order they come.

Those that need a sandbox say so by ``@pytest.mark.sandbox``. Where bwrap cannot make one they are skipped, which the last lines of the test run say, with the
reason. With CI set they fail instead, unless CPODFS_TEST_WITHOUT_SANDBOX is set as well.
"""

from __future__ import annotations

import functools
import os
import time

import pytest

from cpodfs.errors import NotNow
from cpodfs.runs import sandbox
from tests.patience import PATIENCE_S

LONGEST = (
    *("provider_runs", "run_commands", "cli", "fault_matrix", "writeback", "demo", "power"),
    *("damaged_cache", "kinds", "model", "elsewhere", "absence", "hostile_listings", "conflicts"),
    *("runs_deaths", "timeouts", "trust_listing", "histories", "logins", "namespaces", "crash"),
    *("cache", "runs", "provider_script", "trust_own", "open_files"),
)
"""Files that take a minute, each on one worker: begun last, they would keep the others waiting."""

# Offers are heard of after five seconds, as at the real market: too long for every test of a run.
os.environ.setdefault("CPODFS_DEVNET_OFFER_DELAY", "0.1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("sandbox") is None or (reason := _no_sandbox()) is None:
        return
    if os.environ.get("CI", "false") != "false" and not os.environ.get(
        "CPODFS_TEST_WITHOUT_SANDBOX"
    ):
        pytest.fail(f"no sandbox: {reason}; set CPODFS_TEST_WITHOUT_SANDBOX=1 to do without")
    pytest.skip(f"NO SANDBOX WAS TESTED: {reason}")


@functools.cache
def _no_sandbox() -> str | None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return sandbox.never_works()
        except NotNow:  # the machine is busy
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
