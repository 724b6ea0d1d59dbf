"""Says what it sees: its arguments and environment, in ``output/report.json``."""

import json
import os
import sys

import sibling
import yapapi

report = {
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "environ": dict(os.environ),
    "executable": sys.executable,
    "sibling": sibling.VALUE,
    "yapapi": yapapi.__file__,
    "stdin": sys.stdin.read(),
    "group": os.getpgrp() == os.getpid(),
}
with open(os.path.join(os.environ["CPODFS_OUTPUT"], "report.json"), "w") as file:
    json.dump(report, file)
print("to stdout")
print("to stderr", file=sys.stderr)
