"""Stops, by ptrace, the first process of the sandbox that it is in; then ends, or stays so long (s)."""

import ctypes
import sys
import time

PTRACE_ATTACH = 16

if ctypes.CDLL(None).ptrace(PTRACE_ATTACH, 1, None, None) != 0:
    print("refused")
    sys.exit(0)
print("stopped", flush=True)
time.sleep(float(sys.argv[1]))
