"""What tests need of the machine: those that need a sandbox say so by ``@pytest.mark.sandbox``.

Where bwrap cannot make one they are skipped, which the last lines of the test run say, with the
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
