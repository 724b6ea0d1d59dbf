"""Random operations through a real mount and on a plain folder, compared at every step.

By default a bounded run that is the same every time. ``CPODFS_TEST_SEED=n`` starts it elsewhere and
``CPODFS_TEST_MODEL=examples×steps`` (such as ``500x60``) makes it longer. A failure leaves its steps
in a file that ``python -m tests.mount.model FILE [--shrink]`` runs again.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.mount.model import EXCHANGE, NOREPLACE, Twin
from tests.mount.world import World

SEED = int(os.environ.get("CPODFS_TEST_SEED", "1"))
EXAMPLES, STEPS = map(int, os.environ.get("CPODFS_TEST_MODEL", "12x40").split("x"))

NAMES = st.sampled_from("abc")
SIZES = st.sampled_from([0, 1, 100, 4095, 4096, 5000, 70_000, 300_000])
SEEDS = st.integers(0, 9)
SLOTS = st.integers(0, 2)
INDEX = st.integers(0, 1 << 16)
MODES = st.sampled_from([0o600, 0o644, 0o755, 0o400, 0o700, 0o555])
FLAGS = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_RDWR,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDWR | os.O_APPEND,
    ]
)
FAULTS = st.sampled_from(
    [
        {"error_rate": 0.3},
        {"error_rate": 0.3, "status": 503},
        {"drop_rate": 0.3},
        {"truncate_rate": 0.5},
        {"expire_every": 5},
        {"latency_s": 0.02, "latency_jitter_s": 0.08},
        {"error_rate": 0.1, "drop_rate": 0.2, "truncate_rate": 0.2, "expire_every": 7},
    ]
)
DELAYS = st.sampled_from([0.0, 0.05, 0.05, 0.3, 3600.0])
TTLS = st.sampled_from([0.1, 60.0])
TARGETS = st.sampled_from(["a", "b/a", "nowhere"])


class Shared:
    """The world that all examples share; one that an example has broken is not used again."""

    world: World | None = None

    @classmethod
    def get(cls) -> World:
        if cls.world is None:
            cls.world = World()
        return cls.world

    @classmethod
    def discard(cls) -> None:
        world, cls.world = cls.world, None
        if world is not None:
            world.close()


has_handles = precondition(lambda machine: bool(machine.twin and machine.twin.handles))


class PodMachine(RuleBasedStateMachine):
    """Paths are drawn as positions in the plain folder's tree, so that most of them exist."""

    twin: Twin | None = None
    broken = True

    @initialize(delay=DELAYS, ttl=TTLS, planted=st.booleans(), synced=st.booleans())
    def begin(self, delay: float, ttl: float, planted: bool, synced: bool) -> None:
        self.config = (delay, ttl)
        world = Shared.get()
        world.configure(delay, ttl)
        self.twin = Twin(world)
        self.broken = False
        if planted:
            for path in ("a", "a/b", "a/b/c", "b", "b/a"):
                self.do("mkdir", path)
            for seed, path in enumerate(("c", "a/a", "a/b/a", "a/b/c/a", "b/a/b", "b/b")):
                self.do("write_file", path, seed, 100 * seed)
        if synced:
            self.do("sync")

    def do(self, *step: Any) -> None:
        assert self.twin is not None
        try:
            self.twin.step(*step)
        except BaseException as error:
            self.broken = True
            error.add_note(self._recorded())
            raise

    def _recorded(self) -> str:
        assert self.twin is not None
        file = Path(tempfile.mkstemp(prefix="trace-", suffix=".json")[1])
        file.write_text(json.dumps({"config": self.config, "steps": self.twin.trace}))
        steps = "\n".join(map(repr, self.twin.trace))
        return f"seed {SEED}, delay and TTL {self.config}, steps in {file}:\n{steps}"

    def teardown(self) -> None:
        if self.twin is not None and not self.broken:
            self.do("finish")
        if self.broken:
            Shared.discard()

    # -- paths ------------------------------------------------------------------------------------

    def _entries(self, *, dirs: bool = False, files: bool = False) -> list[str]:
        assert self.twin is not None
        found = []
        for folder, subdirs, names in os.walk(self.twin.plain):
            subdirs.sort()
            inside = os.path.relpath(folder, self.twin.plain)
            found += [os.path.normpath(os.path.join(inside, d)) for d in subdirs if not files]
            found += [os.path.normpath(os.path.join(inside, n)) for n in sorted(names) if not dirs]
        return sorted(found)

    def _dir(self, index: int) -> str:
        dirs = [".", *(d for d in self._entries(dirs=True) if d.count("/") < 3)]
        return dirs[index % len(dirs)]

    def _place(self, index: int, name: str) -> str:
        """Any name in any directory: there may be something already."""
        return os.path.normpath(os.path.join(self._dir(index), name))

    def _entry(self, index: int, *, dirs: bool = False, files: bool = False) -> str:
        """Something that exists, or nearly always."""
        entries = self._entries(dirs=dirs, files=files) or ["a"]
        return entries[index % len(entries)]

    # -- names ------------------------------------------------------------------------------------

    @rule(at=INDEX, name=NAMES)
    def mkdir(self, at: int, name: str) -> None:
        self.do("mkdir", self._place(at, name))

    @rule(at=INDEX)
    def rmdir(self, at: int) -> None:
        self.do("rmdir", self._entry(at))

    @rule(at=INDEX)
    def unlink(self, at: int) -> None:
        self.do("unlink", self._entry(at))

    @rule(old=INDEX, at=INDEX, name=NAMES, flags=st.sampled_from([0, 0, 0, 0, NOREPLACE]))
    def rename(self, old: int, at: int, name: str, flags: int) -> None:
        self.do("rename", self._entry(old), self._place(at, name), flags)

    @rule(old=INDEX, at=INDEX, name=NAMES)
    def rename_dir(self, old: int, at: int, name: str) -> None:
        self.do("rename", self._entry(old, dirs=True), self._place(at, name))

    @rule(old=INDEX, new=INDEX, flags=st.sampled_from([0, EXCHANGE]))
    def rename_over(self, old: int, new: int, flags: int) -> None:
        self.do("rename", self._entry(old), self._entry(new), flags)

    @rule(one=INDEX, other=INDEX)
    def swap(self, one: int, other: int) -> None:
        self.do("swap", self._entry(one), self._entry(other))

    @rule(to=TARGETS, at=INDEX, name=NAMES)
    def symlink(self, to: str, at: int, name: str) -> None:
        self.do("symlink", to, self._place(at, name))

    @rule(at=INDEX, how=st.sampled_from(["listdir", "stat", "xattrs", "readlink", "read"]))
    def look(self, at: int, how: str) -> None:
        self.do(how, self._entry(at))

    # -- attributes -------------------------------------------------------------------------------

    @rule(at=INDEX, mode=MODES)
    def chmod(self, at: int, mode: int) -> None:
        self.do("chmod", self._entry(at), mode)

    @rule(at=INDEX, seconds=st.integers(1, 1_400_000_000), fraction=st.integers(0, 999_999_999))
    def utimens(self, at: int, seconds: int, fraction: int) -> None:
        self.do("utimens", self._entry(at), seconds * 10**9 + fraction)

    @rule(at=INDEX, name=NAMES, value=NAMES, flags=st.sampled_from([0, 0, 1, 2]))
    def setxattr(self, at: int, name: str, value: str, flags: int) -> None:
        self.do("setxattr", self._entry(at), f"user.{name}", value, flags)

    @rule(at=INDEX, name=NAMES)
    def removexattr(self, at: int, name: str) -> None:
        self.do("removexattr", self._entry(at), f"user.{name}")

    # -- contents ---------------------------------------------------------------------------------

    @rule(at=INDEX, name=NAMES, seed=SEEDS, size=SIZES)
    def write_file(self, at: int, name: str, seed: int, size: int) -> None:
        self.do("write_file", self._place(at, name), seed, size)

    @rule(at=INDEX, name=NAMES, seed=SEEDS, size=SIZES)
    def save(self, at: int, name: str, seed: int, size: int) -> None:
        self.do("save", self._place(at, name), seed, size)

    @rule(at=INDEX, name=NAMES)
    def create_new(self, at: int, name: str) -> None:
        self.do("create_new", self._place(at, name))

    @rule(at=INDEX, seed=SEEDS, size=SIZES)
    def append(self, at: int, seed: int, size: int) -> None:
        self.do("append", self._entry(at, files=True), seed, size)

    @rule(at=INDEX, offset=SIZES, seed=SEEDS, size=SIZES)
    def write_at(self, at: int, offset: int, seed: int, size: int) -> None:
        self.do("write_at", self._entry(at, files=True), offset, seed, size)

    @rule(at=INDEX, size=SIZES)
    def truncate(self, at: int, size: int) -> None:
        self.do("truncate", self._entry(at, files=True), size)

    # -- handles ----------------------------------------------------------------------------------

    @rule(slot=SLOTS, at=INDEX, flags=FLAGS)
    def open(self, slot: int, at: int, flags: int) -> None:
        self.do("open", slot, self._entry(at, files=True), flags)

    @has_handles
    @rule(slot=SLOTS, offset=SIZES, seed=SEEDS, size=SIZES)
    def pwrite(self, slot: int, offset: int, seed: int, size: int) -> None:
        self.do("pwrite", slot, offset, seed, size)

    @has_handles
    @rule(slot=SLOTS, offset=SIZES, size=SIZES)
    def pread(self, slot: int, offset: int, size: int) -> None:
        self.do("pread", slot, offset, size)

    @has_handles
    @rule(slot=SLOTS, size=SIZES)
    def ftruncate(self, slot: int, size: int) -> None:
        self.do("ftruncate", slot, size)

    @has_handles
    @rule(slot=SLOTS, mode=MODES)
    def fchmod(self, slot: int, mode: int) -> None:
        self.do("fchmod", slot, mode)

    @has_handles
    @rule(slot=SLOTS, how=st.sampled_from(["fstat", "fsync", "close"]))
    def with_handle(self, slot: int, how: str) -> None:
        self.do(how, slot)

    # -- surroundings -----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.06, 0.12, 0.35]))
    def pause(self, seconds: float) -> None:
        self.do("pause", seconds)

    @rule(faults=FAULTS, seed=st.integers(0, 99))
    def faults(self, faults: dict[str, Any], seed: int) -> None:
        self.do("faults", {"seed": seed, **faults})

    @rule(how=st.sampled_from(["calm", "sync", "sync", "compare"]))
    def check(self, how: str) -> None:
        self.do(how)

    @rule(
        how=st.sampled_from(["kill", "remount", "wipe", "wipe", "restart", "down"]),
        hard=st.booleans(),
    )
    def upheaval(self, how: str, hard: bool) -> None:
        if how in ("restart", "down"):
            self.do(f"server_{how}", hard)
            return
        self.do(how)
        self.do("compare")


def test_the_mount_behaves_like_a_plain_folder() -> None:
    print(f"seed {SEED}, {EXAMPLES} examples of {STEPS} steps")
    profile = hypothesis.settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
        verbosity=hypothesis.Verbosity.normal,
    )
    try:
        run_state_machine_as_test(hypothesis.seed(SEED)(PodMachine), settings=profile)
    finally:
        Shared.discard()
