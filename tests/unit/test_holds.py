"""Which part of a pod a run's hold covers, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpodfs.cache.schema import DIR, FILE, ROOT
from cpodfs.cache.store import Store
from cpodfs.sync.holds import Extent, Holds

PLAIN = Extent(("payload", "output", "logs"), ("script",))


@pytest.mark.parametrize(
    ("extent", "covered", "left"),
    [
        (PLAIN, ("script", "script/lib", "other", "payloads"), ("payload", "payload/x", "logs/1")),
        (
            Extent(("payload", "output"), ("payload/code",)),
            ("payload", "payload/code", "payload/code/x"),
            ("payload/data", "output"),
        ),
        (
            Extent(("output", "logs"), ("script", "output/in")),
            ("output", "output/in"),
            ("output/x",),
        ),
    ],
)
def test_an_extent(extent: Extent, covered: tuple[str, ...], left: tuple[str, ...]) -> None:
    assert [folder for folder in covered if not extent.covers(folder)] == []
    assert [folder for folder in left if extent.covers(folder)] == []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "meta.db")


def test_what_is_known_is_held_first_and_everything_later(store: Store, tmp_path: Path) -> None:
    pod = store.create(ROOT, "pod", DIR, 0o700).ino
    script = store.create(pod, "script", DIR, 0o700).ino
    known = store.create(script, "known", FILE, 0o600, cached=1).ino
    unknown = store.create(script, "unknown", FILE, 0o600).ino
    payload = store.create(pod, "payload", DIR, 0o700).ino
    data = store.create(payload, "data", FILE, 0o600, cached=1).ino
    other = store.create(ROOT, "pod 2", DIR, 0o700).ino
    everything = (ROOT, pod, script, known, unknown, payload, data, other)
    store.set(pod, listed_s=1.0)
    holds = Holds(store, tmp_path / "held.json")
    assert not any(map(holds.is_held, everything))
    holds.begin("pod", PLAIN)
    assert [ino for ino in everything if holds.is_held(ino)] == [pod, known]
    assert [ino for ino in everything if holds.covers(ino)] == [pod, script, known, unknown]
    assert not holds.is_sealed("pod")
    holds.seal("pod")
    assert holds.is_sealed("pod")
    for each in (holds, Holds(store, tmp_path / "held.json")):
        assert [ino for ino in everything if each.is_held(ino)] == [pod, script, known, unknown]
    holds.end("pod")
    for each in (holds, Holds(store, tmp_path / "held.json")):
        assert not any(map(each.covers, everything))


def test_holds_of_runs_that_have_ended_meanwhile(store: Store, tmp_path: Path) -> None:
    pods = [store.create(ROOT, name, DIR, 0o700).ino for name in ("one", "two")]
    before = Holds(store, tmp_path / "held.json")
    for name in ("one", "two"):
        before.begin(name, PLAIN)
        before.seal(name)
    after = Holds(store, tmp_path / "held.json")
    after.end_all_but(["two"])
    assert [after.is_held(pod) for pod in pods] == [False, True]
    for nonsense in ("", "[]", '{"one": 1}', '{"one": {"without": 3}}'):
        (tmp_path / "held.json").write_text(nonsense)
        assert not Holds(store, tmp_path / "held.json").is_held(pods[0])
