"""Provider runs over a network: ``python -m tests.bench.bench_network [--rounds N] [MS …]``.

For each latency (milliseconds each way, default 0 50 150 400): hello prints a line and writes a file,
slow prints 8 lines, one a second, loud prints 5 MB of UTF-8 and of bytes that are no text without a
final newline, tasks is 40 files over 4 providers. Every output is compared byte for byte; every
provider must have one agreement, which is paid. Says how often that held, how long the runs took, and
for slow how late a line was in the log; that limit is the poll and 3 round trips.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.report import machine, table
from tests.mount.compute import record, run_folders
from tests.mount.provider_pods import (
    MarketMount,
    check_results,
    check_tidy,
    foreach_pod,
    provider_pod,
)

POLL_S = 0.5
LIMIT_S = 300.0
HELLO = "echo hello; echo result > output/result"
SLOW = 'for i in 1 2 3 4 5 6 7 8; do echo "$i $(date +%s%N)"; sleep 1; done'
LOUD = "cat payload/loud; cat payload/loud >&2"


def touched(pod: Path, lines: list[float] | None = None) -> Path:
    """One run to its end; its folder. ``lines`` gets how late each line was in the log, in seconds."""
    before = len(run_folders(pod))
    subprocess.run(["touch", ".run"], cwd=pod, check=True)
    deadline, seen = time.monotonic() + LIMIT_S, 0
    while (pod / ".run").exists():
        if time.monotonic() > deadline:
            raise AssertionError("not over in time")
        if lines is not None and len(run_folders(pod)) > before:
            log = run_folders(pod)[-1] / "stdout.log"
            said = log.read_text().splitlines() if log.exists() else []
            lines += [time.time() - int(line.split()[1]) / 1e9 for line in said[seen:]]
            seen = len(said)
        time.sleep(0.02)
    return run_folders(pod)[-1]


def check(mount: MarketMount, folder: Path) -> None:
    ended = record(folder)
    if ended["state"] != "finished":
        raise AssertionError(f"{ended['state']}: {ended['error']}")
    ended = check_tidy(mount, folder)
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    hired = ended["golem"]["providers"]
    assert len({one["id"] for one in hired}) == len(hired)
    assert all(one["paid"] for one in hired)


class Parts:
    """The four programs, each with what it must come to."""

    def __init__(self, mount: MarketMount) -> None:
        self.mount = mount
        options: dict[str, Any] = {"poll": POLL_S, "timeout": "5m"}
        self._hello = provider_pod(mount, "hello", "sh script/run.sh", HELLO, **options)
        self._slow = provider_pod(mount, "slow", "sh script/run.sh", SLOW, **options)
        self._loud = provider_pod(mount, "loud", "sh script/run.sh", LOUD, **options)
        text = "grüße, 世界 🌍\n".encode() * 100_000
        self._said = text + bytes(range(256)) * 10_000 + b"no newline"
        (self._loud / "payload/loud").write_bytes(self._said)
        self._tasks = foreach_pod(mount, "tasks", 40, workers=4, seconds=0.3, **options)
        self.late: list[float] = []

    def hello(self) -> None:
        folder = touched(self._hello)
        check(self.mount, folder)
        assert (folder / "stdout.log").read_bytes() == b"hello\n"
        assert (self._hello / "output/result").read_bytes() == b"result\n"

    def slow(self) -> None:
        late: list[float] = []
        folder = touched(self._slow, late)
        check(self.mount, folder)
        said = (folder / "stdout.log").read_text().splitlines()
        assert [line.split()[0] for line in said] == list("12345678")
        # The last ones may come with the end of the run, in which nobody looks.
        self.late += late[:6]

    def loud(self) -> None:
        folder = touched(self._loud)
        check(self.mount, folder)
        assert (folder / "stdout.log").read_bytes() == self._said
        assert (folder / "stderr.log").read_bytes().endswith(self._said)

    def tasks(self) -> None:
        for number in range(40):
            (self._tasks / f"output/{number:02}.out").unlink(missing_ok=True)
        folder = touched(self._tasks)
        check(self.mount, folder)
        for old in run_folders(self._tasks)[:-1]:
            subprocess.run(["rm", "-r", str(old)], check=True)
        check_results(self._tasks, 40)


def measured(latency_s: float, rounds: int) -> list[list[str]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        mount = MarketMount(Path(folder))
        mount.env["CPODFS_DEVNET_PROVIDER_LATENCY"] = str(latency_s)
        mount.start()
        try:
            parts = Parts(mount)
            for name in ("hello", "slow", "loud", "tasks"):
                took, wrong = [], []
                for _ in range(rounds):
                    begun = time.monotonic()
                    try:
                        getattr(parts, name)()
                    except (AssertionError, KeyError) as error:
                        wrong.append(f"{type(error).__name__} {error}".splitlines()[0])
                    took.append(time.monotonic() - begun)
                late = (
                    f"{max(parts.late):.2f} of {POLL_S + 6 * latency_s:.2f}"
                    if name == "slow"
                    else ""
                )
                right = f"{rounds - len(wrong)} of {rounds}"
                row = [
                    f"{latency_s * 1000:g} ms",
                    name,
                    right,
                    f"{statistics.median(took):.1f}",
                    late,
                ]
                print(*row, *wrong, flush=True)
                rows.append(row)
        finally:
            mount.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("latencies", type=float, nargs="*", default=[0, 50, 150, 400])
    given = parser.parse_args()
    print(machine())
    rows = [row for ms in given.latencies for row in measured(ms / 1000, given.rounds)]
    header = ["each way", "program", "right", "median s", "latest line, s"]
    print(table(header, rows, text=(0, 1)))


if __name__ == "__main__":
    main()
