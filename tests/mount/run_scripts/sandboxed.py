"""Tries, in a pod of a stranger's, what strangers may try. Prints what came of it as JSON."""

import json
import os
import sys

pod = os.getcwd()
outside = sys.argv[1]


def attempt(action):
    try:
        return action() or "done"
    except OSError as error:
        return error.strerror


def write(path):
    with open(path, "w") as file:
        file.write("x")


def open_to_write(path):
    os.close(os.open(path, os.O_WRONLY))


with open("output/mine", "w") as file:
    file.write("written")
report = {
    "others": os.listdir(os.path.dirname(pod)),
    "read outside": attempt(lambda: os.close(os.open(outside, os.O_RDONLY))),
    "write outside": attempt(lambda: write(os.path.join(os.path.dirname(outside), "new"))),
    "write /usr": attempt(lambda: write("/usr/new")),
    "write /": attempt(lambda: write("/new")),
    "write /etc": attempt(lambda: write("/etc/new")),
    # Opened only: it is the machine's.
    "set kernel": attempt(lambda: open_to_write("/proc/sys/kernel/core_pattern")),
    "home": os.listdir(os.environ["HOME"]),
    "tmp": attempt(lambda: write("/tmp/new")),
    "trust": attempt(
        lambda: os.setxattr(pod, "user.cpodfs.request.1", b'{"ask": "own", "pod": "x"}')
    ),
    "end all": attempt(lambda: os.setxattr(pod, "user.cpodfs.runs", b"0")),
    "upper": attempt(lambda: os.setxattr(os.path.dirname(pod), "user.cpodfs.runs", b"0")),
    "pids": sum(name.isdigit() for name in os.listdir("/proc")),
    "environ": dict(os.environ),
}
print(json.dumps(report))
