"""The crash test of ``tests/bench/crash.py``, with as many deaths as CI has time for."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.bench.crash import crash


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    seed = int(os.environ.get("CPODFS_TEST_SEED", random.randrange(1 << 30)))
    print("seed", seed)
    assert crash(tmp_path, 10, seed) > 100
