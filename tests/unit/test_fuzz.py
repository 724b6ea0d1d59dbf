"""Some thousands of the mutated inputs of the bench ``tests/bench/fuzz.py``."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.bench.fuzz import fuzz, targets

INPUTS = 3000


def test_parsers_answer_or_raise_what_they_document(tmp_path: Path) -> None:
    seed = int(os.environ.get("CPODFS_TEST_SEED", random.randrange(1 << 30)))
    counts, found = fuzz(tmp_path, INPUTS, seed)
    assert not found, "\n".join(found[:5])
    for name, (taken, refused) in counts.items():
        assert taken, f"{name}: nothing was taken, so little was tried"
        assert taken + refused >= INPUTS // len(counts)


def test_a_request_that_is_nested_without_end_is_not_understood(tmp_path: Path) -> None:
    targets(tmp_path)["request"].read(b"[" * 100_000)
