"""Gives a program a session keyring of its own, so that the user's keys are not within its reach.

Imports the standard library only. Runs between fork and exec: no locks, nothing that could wait.
"""

from __future__ import annotations

import ctypes
import errno
import os

_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
"""The system call's number, which glibc has no function for."""
_JOIN_SESSION_KEYRING = 1
_HARMLESS = (errno.ENOSYS, errno.EPERM, errno.EACCES)
"""The kernel has no keyrings or a container hides them, from the program as from us."""
_CANNOT_START = 126

_libc = ctypes.CDLL(None, use_errno=True)


def leave_session() -> None:
    """Join a new, empty session keyring; for ``preexec_fn``. Where keyrings cannot be used nothing
    happens; what else may fail (a quota) ends the process, with the reason on its stderr."""
    number = _KEYCTL.get(os.uname().machine)
    # The numbers are those of 64-bit programs.
    if number is None or ctypes.sizeof(ctypes.c_long) < 8:
        return
    joined = _libc.syscall(number, ctypes.c_long(_JOIN_SESSION_KEYRING), None)
    code = ctypes.get_errno()
    if joined == -1 and code not in _HARMLESS:
        os.write(2, f"cpodfs: no session keyring of its own: {os.strerror(code)}\n".encode())
        os._exit(_CANNOT_START)
