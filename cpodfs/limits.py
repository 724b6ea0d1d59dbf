"""How many files this process may have open, and how many of them a mount's users.

A leaf. The driver raises its soft limit to the hard one: each file that is open in the mount has one
descriptor here. Programs that it starts for users get back the limit that it was started with, above
which ``select`` does not work.
"""

from __future__ import annotations

import resource

SOFT_AT_START = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
ENOUGH = 1 << 20
"""fusermount3 closes every number below the limit before it does anything, which takes it a tenth of
a second for so many, and minutes for the billion that some containers have."""
RESERVE = 320
"""Descriptors that no open file of a user may take. They are for the journal, for 64 uploads and 64
downloads at most with their 32 connections, for two of each file being synced, for runs and their
pipes. Of a limit that is very low they are half."""


def raise_open_files() -> int:
    """Raise the soft limit as far as it is of use; returns the descriptors that users may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, min(hard, ENOUGH)) if resource.RLIM_INFINITY not in (soft, hard) else ENOUGH
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit - min(RESERVE, limit // 2)


def give_back_open_files(soft: int) -> None:
    """Set the soft limit of this process to the customary one, before it starts a user's program."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
