"""Counts its starts in a folder outside the mount, prints, and waits there to be let on.

``gated.py FOLDER``: "one" is printed before the gate, "two" after it. What asks it to end is noted and obeyed.
"""

import os
import signal
import sys
import time

folder = sys.argv[1]


def say(word):
    fd = os.open(os.path.join(folder, "said"), os.O_WRONLY)
    os.write(fd, f"{word}\n".encode())
    os.close(fd)


def terminated(number, _frame):
    with open(os.path.join(folder, "terminated"), "w") as file:
        file.write(f"{signal.Signals(number).name}\n")
    sys.exit(7)


for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, terminated)
with open(os.path.join(folder, "count"), "a") as file:
    file.write(f"{time.time()}\n")
print("one", flush=True)
try:
    with open("output/partial", "w") as file:
        file.write("so far\n")
except OSError as error:
    # The driver may have died.
    print(error.strerror, file=sys.stderr)
say("waiting")
with open(os.path.join(folder, "gate"), "rb", buffering=0) as gate:
    gate.read(3)
print("two", flush=True)
try:
    with open(os.path.join(os.environ["CPODFS_OUTPUT"], "partial"), "a") as file:
        file.write("and more\n")
except OSError as error:
    # There may be no driver just now.
    print(error.strerror, file=sys.stderr)
