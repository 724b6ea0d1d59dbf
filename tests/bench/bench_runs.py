"""What touch-to-run costs: ``python -m tests.bench.bench_runs [RUNS]``.

Times from ``touch .run`` to the program's first instruction, from its ``print(flush)`` to whoever
reads the log, from its last instruction to ``.run`` gone; beside each the same program started by a
shell with its output in a local file. Medians in ms; clocks are this machine's CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.mount.compute import SCRIPTS, Inotify, compute_pod, devnet_mounted, run_folders
from tests.patience import PATIENCE_S, until

RUNS = 10
LINES = 25
# Not a divisor of the second at which tail polls.
PAUSE_S = 0.37
POLL_S = 0.005
TAIL = ["tail", "-n", "+1"]


@dataclass
class Reader(threading.Thread):
    """Follows a log in some way; ``delays_ms`` of the lines, whose second word is their time."""

    path: Path
    delays_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def took(self, line: bytes) -> None:
        self.delays_ms.append((time.monotonic_ns() - int(line.split()[1])) / 1e6)

    def result(self) -> float:
        self.join(PATIENCE_S)
        assert len(self.delays_ms) == LINES, f"{self.path}: {len(self.delays_ms)} lines"
        return statistics.median(self.delays_ms)


class Tail(Reader):
    options: tuple[str, ...] = ("-f",)

    def run(self) -> None:
        command = [*TAIL, *self.options, str(self.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tail:
            assert tail.stdout is not None
            for _ in range(LINES):
                self.took(tail.stdout.readline())
            tail.kill()


class FastTail(Tail):
    options = ("-f", "-s", "0.05")


class Poll(Reader):
    def run(self) -> None:
        self.follow(lambda: time.sleep(POLL_S))

    def follow(self, wait: Callable[[], object]) -> None:
        with self.path.open("rb") as file:
            rest = b""
            while len(self.delays_ms) < LINES:
                *lines, rest = (rest + file.read()).split(b"\n")
                for line in lines:
                    self.took(line)
                wait()


class Watch(Poll):
    def run(self) -> None:
        watch = Inotify(self.path)
        self.follow(lambda: watch.wait(1.0))
        watch.close()


READERS = {
    "print to an inotify reader": Watch,
    f"print to a reader polling every {POLL_S * 1000:.0f} ms": Poll,
    "print to tail -f -s 0.05": FastTail,
    "print to tail -f": Tail,
}


class Bench:
    """One pod, and a folder outside for the stamps and the direct runs."""

    def __init__(self, pod: Path, outside: Path) -> None:
        self.pod = pod
        self.outside = outside
        self.stamps = outside / "stamps"

    def program(self, lines: int) -> str:
        return f"python3 script/stamps.py {self.stamps} {lines} {PAUSE_S}"

    def prepare(self, lines: int) -> None:
        self.stamps.unlink(missing_ok=True)
        (self.pod / "a.recipe").write_text(json.dumps({"golem": {"exec": self.program(lines)}}))

    def touched(self) -> tuple[float, float]:
        """One run: ms to its first instruction, ms from its last to ``.run`` gone."""
        self.prepare(0)
        begun = time.monotonic_ns()
        subprocess.run(["touch", ".run"], cwd=self.pod, check=True)
        while os.path.exists(self.pod / ".run"):
            time.sleep(0.001)
        return self.times(begun, time.monotonic_ns())

    def direct(self) -> tuple[float, float]:
        """The same program from a shell, its output in a file."""
        self.prepare(0)
        begun = time.monotonic_ns()
        self.shell(0).wait()
        return self.times(begun, time.monotonic_ns())

    def times(self, begun: int, seen: int) -> tuple[float, float]:
        first, last = map(int, self.stamps.read_text().split())
        return (first - begun) / 1e6, (seen - last) / 1e6

    def shell(self, lines: int) -> subprocess.Popen[bytes]:
        command = f"{self.program(lines)} > {self.outside}/out"
        folder = str(Path(sys.executable).parent)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(["sh", "-c", command], cwd=self.pod, env={"PATH": path})

    def followed(self) -> dict[str, float]:
        """Median ms from print to each reader of a run's log."""
        self.prepare(LINES)
        before = len(run_folders(self.pod))
        subprocess.run(["touch", ".run"], cwd=self.pod, check=True)
        until(lambda: len(run_folders(self.pod)) > before)
        log = run_folders(self.pod)[-1] / "stdout.log"
        until(log.exists)
        answer = self.read(log)
        until(lambda: not (self.pod / ".run").exists())
        return answer

    def followed_directly(self) -> dict[str, float]:
        self.prepare(LINES)
        log = self.outside / "out"
        log.unlink(missing_ok=True)
        process = self.shell(LINES)
        until(log.exists)
        answer = self.read(log)
        process.wait()
        return answer

    def read(self, log: Path) -> dict[str, float]:
        readers = {name: kind(log) for name, kind in READERS.items()}
        for reader in readers.values():
            reader.start()
        return {name: reader.result() for name, reader in readers.items()}


def show(name: str, ours: float, shell: float) -> None:
    print(f"{name:<42}{ours:>10.1f}{shell:>10.1f}{ours / shell:>8.1f}", flush=True)


def main(runs: int = RUNS) -> None:
    with tempfile.TemporaryDirectory() as folder, devnet_mounted(Path(folder, "mount")) as mount:
        pod = compute_pod(mount, "bench", "true", "stamps.py")
        assert (SCRIPTS / "stamps.py").read_bytes() == (pod / "script/stamps.py").read_bytes()
        bench = Bench(pod, Path(folder))
        bench.touched(), bench.direct()
        pairs = [(bench.touched(), bench.direct()) for _ in range(runs)]
        print(f"medians of {runs} runs, {LINES} lines; ms{'touch':>20}{'shell':>10}{'ratio':>8}")
        for part, name in enumerate(("start to first instruction", "last instruction to the end")):
            ours = statistics.median(touched[part] for touched, _ in pairs)
            shell = statistics.median(direct[part] for _, direct in pairs)
            show(name, ours, shell)
        followed, directly = bench.followed(), bench.followed_directly()
        for name in READERS:
            show(name, followed[name], directly[name])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
