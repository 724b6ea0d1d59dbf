"""Tells when it began, printed and ended, for the bench: ``stamps.py FILE LINES SECONDS_BETWEEN``."""

import time

first = time.monotonic_ns()

import sys  # noqa: E402

path, lines, pause_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for number in range(lines):
    time.sleep(pause_s)
    print(f"{number} {time.monotonic_ns()}", flush=True)
with open(path, "w") as file:
    file.write(f"{first} {time.monotonic_ns()}")
