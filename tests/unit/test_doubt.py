"""When an absence is a deletion, without a server: the rule, and the register that applies it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpodfs.cache.schema import DIR, FILE, ROOT
from cpodfs.cache.store import Store
from cpodfs.errors import NotFound, PodNotFound
from cpodfs.sync.doubt import (
    DISTRUST_S,
    ENOUGH,
    FEW,
    MANY,
    MUCH,
    STUBBORN,
    Absence,
    Folder,
    Verdict,
    is_much,
    judge,
    pause_s,
)
from cpodfs.sync.missing import Missing

FILE_GONE = Absence(holds=False, confirmed=ENOUGH)
ONE_OF_TEN = Folder(known=10, missing=1, unchanged=9, whole=True)


def verdict(folder: Folder, absence: Absence, lied_s: float | None = None) -> Verdict:
    return judge(folder, absence, lied_s, 1000.0)


def test_one_file_among_neighbours_is_deleted_after_two_looks() -> None:
    assert verdict(ONE_OF_TEN, Absence(holds=False, confirmed=ENOUGH - 1)) is Verdict.DOUBTFUL
    assert verdict(ONE_OF_TEN, FILE_GONE) is Verdict.DELETED


@pytest.mark.parametrize(
    ("folder", "absence", "confirmed"),
    [
        (ONE_OF_TEN, Absence(holds=True, confirmed=0), MANY),
        (Folder(known=1, missing=1, unchanged=0, whole=True), FILE_GONE, MANY),
        (Folder(known=3, missing=1, unchanged=2, whole=True, is_root=True), FILE_GONE, ENOUGH),
    ],
    ids=["a directory with content", "no neighbour", "an empty pod"],
)
def test_the_weaker_the_evidence_the_more_looks(
    folder: Folder, absence: Absence, confirmed: int
) -> None:
    for looks in range(confirmed):
        found = Absence(absence.holds, looks)
        assert verdict(folder, found) is Verdict.DOUBTFUL
    assert verdict(folder, Absence(absence.holds, confirmed)) is Verdict.DELETED


def test_a_listing_that_leaves_names_out_proves_nothing() -> None:
    folder = Folder(known=10, missing=1, unchanged=9, whole=False)
    assert verdict(folder, Absence(holds=False, confirmed=10**6)) is Verdict.DOUBTFUL


def test_a_server_that_lied_is_not_believed_for_a_while() -> None:
    sure = Absence(holds=False, confirmed=MANY)
    assert judge(ONE_OF_TEN, sure, 1000.0, 1000.0 + DISTRUST_S - 1) is Verdict.DOUBTFUL
    assert judge(ONE_OF_TEN, sure, 1000.0, 1000.0 + DISTRUST_S) is Verdict.DELETED


@pytest.mark.parametrize(
    ("folder", "absence"),
    [
        (Folder(known=40, missing=16, unchanged=24, whole=True), FILE_GONE),
        (Folder(known=40, missing=40, unchanged=0, whole=True), FILE_GONE),
        (Folder(known=10**6, missing=MUCH + 1, unchanged=10**5, whole=True), FILE_GONE),
        (Folder(known=9, missing=1, unchanged=8, whole=True, is_root=True), Absence(True, 99)),
        (Folder(known=1, missing=1, unchanged=0, whole=True, is_root=True), FILE_GONE),
        (Folder(known=1, missing=1, unchanged=0, whole=True), Absence(True, 99)),
    ],
    ids=["a share", "all", "many", "a pod", "the last pod", "all that a folder held"],
)
def test_much_at_once_is_an_alarm_however_often_confirmed(folder: Folder, absence: Absence) -> None:
    assert verdict(folder, absence) is Verdict.ALARM
    assert verdict(folder, Absence(absence.holds, 10**6)) is Verdict.ALARM


def test_few_are_never_much() -> None:
    assert not is_much(Folder(known=FEW, missing=FEW, unchanged=0, whole=True))
    assert is_much(Folder(known=FEW + 1, missing=FEW + 1, unchanged=0, whole=True))


def test_looks_are_ever_further_apart() -> None:
    pauses = [pause_s(confirmed) for confirmed in range(12)]
    assert pauses == sorted(pauses)
    assert not Absence(False, 1, last_s=10.0).counts(10.0 + pause_s(1) / 2)
    assert Absence(False, 1, last_s=10.0).counts(10.0 + pause_s(1))


# -- the register ----------------------------------------------------------------------------------


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A pod ``pod`` with a folder ``d`` and some files in that, all known to be at the server."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "meta.db")
        self.clock = Clock()
        self.missing = Missing(self.store, clock=self.clock)
        self.pod = self.add(ROOT, "pod", DIR)
        self.dir = self.add(self.pod, "d", DIR)
        self.files = [self.add(self.dir, name, FILE) for name in "abc"]

    def add(self, rparent: int, name: str, kind: str) -> int:
        home = self.store.remote(rparent)
        assert home is not None
        assert home.ino is not None
        ino = self.store.create(home.ino, name, kind, 0o600, size=1, cached=1).ino
        return self.store.add_remote(rparent, name, kind, size=1, mtime_s=1, mode=0o600, ino=ino)

    def confirmed(self, rid: int) -> int:
        remote = self.store.remote(rid)
        assert remote is not None
        return remote.absences


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_confirmation_needs_a_pause_and_a_pod_opened_anew(world: World) -> None:
    one, clock = world.files[0], world.clock
    world.missing.suspect(one)
    world.missing.confirm(one, opened_s=0.0)
    assert world.confirmed(one) == 1, "the first, whenever the pod was opened"
    world.missing.confirm(one, opened_s=clock.now_s + 1)
    assert world.confirmed(one) == 1, "too soon"
    clock.now_s += pause_s(1)
    world.missing.confirm(one, opened_s=clock.now_s - pause_s(1))
    assert world.confirmed(one) == 1, "the server only says again what it remembers"
    world.missing.confirm(one, opened_s=clock.now_s)
    assert world.confirmed(one) == 2


def test_what_returns_begins_at_nothing_and_was_a_lie(world: World) -> None:
    one = world.files[0]
    world.missing.suspect(one)
    world.missing.confirm(one, opened_s=0.0)
    assert not world.missing.distrusted
    world.missing.seen(one)
    assert world.store.doubtful() == []
    assert world.confirmed(one) == 0
    assert world.missing.distrusted
    world.clock.now_s += DISTRUST_S
    assert not world.missing.distrusted


def test_who_sees_a_file_has_seen_the_folders_above_it(world: World) -> None:
    world.missing.suspect(world.dir)
    world.missing.suspect(world.pod)
    world.missing.seen(world.files[0])
    assert [r.rid for r in world.store.doubtful()] == [world.pod], "a pod is in the list, or is not"


def test_a_missing_pod_says_nothing_of_what_is_in_it(world: World) -> None:
    world.missing.said_absent(world.files[0], PodNotFound("pod does not exist"))
    assert [r.rid for r in world.store.doubtful()] == [world.pod]
    world.missing.said_absent(world.files[0], NotFound("file not found in dfs"))
    assert {r.rid for r in world.store.doubtful()} == {world.pod, world.files[0]}


def test_looks_at_a_folder_are_ever_further_apart(world: World) -> None:
    world.missing.suspect(world.files[0])
    waits = []
    for _ in range(6):
        started = world.clock.now_s
        while not (due := world.missing.take_due()):
            world.clock.now_s += 0.25
        assert due == [world.dir]
        waits.append(world.clock.now_s - started)
        world.missing.suspect(world.files[0])
    assert waits == sorted(waits)
    assert waits[-1] > 10 * waits[0]


def test_after_a_start_what_was_doubtful_is_looked_at(world: World) -> None:
    world.missing.suspect(world.files[0])
    again = Missing(world.store, clock=world.clock)
    again.resume()
    world.clock.now_s += pause_s(1)
    assert again.take_due() == [world.dir]


def test_an_alarm_is_said_once_until_it_ends(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(known=3, missing=3, unchanged=0, whole=True)
    for _ in range(5):
        world.missing.alarm(world.dir, folder)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "'pod/d'" in caplog.text
    world.missing.settled(world.dir)
    assert world.missing.alarms == {}


def test_an_earlier_version_is_believed_later_than_an_absence(world: World) -> None:
    one, folder = world.files[0], Folder(known=3, missing=1, unchanged=2, whole=True)
    world.missing.suspect(one)
    world.missing.confirm(one, opened_s=None)
    world.missing.is_outdated(one, True)
    assert world.confirmed(one) == 0, "that it was absent says nothing of its version"
    for looks in range(STUBBORN):
        assert world.missing.judge(one, folder) is Verdict.DOUBTFUL
        world.clock.now_s += pause_s(looks)
        world.missing.confirm(one, opened_s=None)
    assert world.missing.judge(one, folder) is Verdict.DELETED
    world.missing.accept_older(one)
    remote = world.store.remote(one)
    assert remote is not None
    assert not remote.is_older(1), "whatever is shown next is news"
    assert world.store.doubtful() == []
