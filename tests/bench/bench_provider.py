"""What a provider run costs: ``python -m tests.bench.bench_provider [PART …]``; parts: run, each, copy.

run: overhead beyond the program, from a printed line to the log, from a written output file to
``ls``. each: 40 tasks of 0.3 s, then of 1 s, over one provider and over four. copy: transfers both ways against
``cp``. All on the local market, on one machine; clocks are CLOCK_REALTIME of this machine.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.mount.compute import record, run_folders, run_to_end
from tests.mount.provider_pods import (
    MarketMount,
    check_results,
    check_tidy,
    foreach_pod,
    market_mounted,
    provider_pod,
)
from tests.patience import until

POLL_S = 0.5
ROUNDS = 5
LINES = 20
MIB = 1 << 20
SIZE_MIB = 64

STAMPS = "date +%s%N > output/first; date +%s%N > output/last\n"
FILES = f"""
i=0
while [ $i -lt {LINES} ]; do
    date +%s%N > output/.new; mv output/.new output/f$i
    date "+line %s%N"
    i=$((i+1)); sleep 0.37
done
"""


def show(name: str, value: float, unit: str, note: str = "") -> None:
    print(f"{name:<52}{value:>10.1f} {unit:<5} {note}", flush=True)


def bench_run(mount: MarketMount) -> None:
    pod = provider_pod(mount, "stamps", "sh script/run.sh", STAMPS, poll=POLL_S)
    before, after, whole = [], [], []
    for _ in range(ROUNDS):
        begun = time.time_ns()
        folder = run_to_end(pod)
        ended = time.time_ns()
        assert record(folder)["state"] == "finished"
        first, last = (int((pod / "output" / name).read_text()) for name in ("first", "last"))
        before.append((first - begun) / 1e6)
        after.append((ended - last) / 1e6)
        whole.append((ended - begun - (last - first)) / 1e6)
    show("touch to first instruction", statistics.median(before), "ms")
    show("last instruction to .run gone", statistics.median(after), "ms")
    show("overhead beyond the program", statistics.median(whole), "ms", f"of {ROUNDS} runs")
    bench_latency(mount)


def bench_latency(mount: MarketMount) -> None:
    pod = provider_pod(mount, "latency", "sh script/run.sh", FILES, poll=POLL_S)
    subprocess.run(["touch", ".run"], cwd=pod, check=True)
    until(lambda: run_folders(pod) and (run_folders(pod)[-1] / "stdout.log").exists())
    log = run_folders(pod)[-1] / "stdout.log"
    lines: list[float] = []
    files: dict[str, float] = {}
    while (pod / ".run").exists():
        now = time.time_ns()
        for line in log.read_text().splitlines()[len(lines) :]:
            lines.append((now - int(line.split()[1])) / 1e6)
        for name in (
            set(os.listdir(pod / "output")) - set(files) if (pod / "output").exists() else ()
        ):
            if name.startswith("f"):
                files[name] = (time.time_ns() - int((pod / "output" / name).read_text())) / 1e6
        time.sleep(0.01)
    show("printed line to the log", statistics.median(lines), "ms", f"max {max(lines):.0f}")
    late = f"max {max(files.values()):.0f}, poll {POLL_S} s"
    show("written output file to ls", statistics.median(files.values()), "ms", late)


def bench_each(mount: MarketMount) -> None:
    for seconds in (0.3, 1.0):
        took = {}
        for workers in (1, 4):
            name = f"each {workers} {seconds}"
            pod = foreach_pod(mount, name, 40, workers=workers, seconds=seconds, timeout="5m")
            begun = time.monotonic()
            folder = run_to_end_in(pod, 120)
            took[workers] = time.monotonic() - begun
            check_tidy(mount, folder)
            check_results(pod, 40)
            show(f"40 tasks of {seconds} s over {workers}", took[workers], "s")
        show("times faster", took[1] / took[4], "")


def run_to_end_in(pod: Path, seconds: float) -> Path:
    subprocess.run(["touch", ".run"], cwd=pod, check=True)
    deadline = time.monotonic() + seconds
    while (pod / ".run").exists():
        assert time.monotonic() < deadline, "not over in time"
        time.sleep(0.02)
    return run_folders(pod)[-1]


def bench_copy(mount: MarketMount) -> None:
    source = mount.point.parent / "big"
    with source.open("wb") as file:
        for _ in range(SIZE_MIB):
            file.write(os.urandom(MIB))
    script = "date +%s%N > output/there; cp payload/big output/back; date +%s%N > output/copied\n"
    pod = provider_pod(mount, "copy", "sh script/run.sh", script, timeout="5m", poll=30)
    cp_in = timed(lambda: shutil.copyfile(source, pod / "payload/big"))
    begun = time.time_ns()
    folder = run_to_end_in(pod, 200)
    ended = time.time_ns()
    assert record(folder)["state"] == "finished", (folder / "stderr.log").read_text()
    there, copied = (int((pod / "output" / name).read_text()) for name in ("there", "copied"))
    cp_out = timed(lambda: shutil.copyfile(pod / "payload/big", pod / "output/copy"))
    assert (pod / "output/back").read_bytes() == source.read_bytes()
    note = f"{SIZE_MIB} MiB; includes the run's own overhead"
    show("cp into the mount", SIZE_MIB / cp_in, "MiB/s")
    show("cp within the mount", SIZE_MIB / cp_out, "MiB/s")
    show("pod to provider, from touch", SIZE_MIB / ((there - begun) / 1e9), "MiB/s", note)
    show("provider to pod, to .run gone", SIZE_MIB / ((ended - copied) / 1e9), "MiB/s", note)


def timed(what: Callable[[], object]) -> float:
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


PARTS = {"run": bench_run, "each": bench_each, "copy": bench_copy}


def main(parts: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        market_mounted(Path(folder, "mount"), "one two three four") as mount,
    ):
        for part in parts or PARTS:
            PARTS[part](mount)


if __name__ == "__main__":
    main(sys.argv[1:])
