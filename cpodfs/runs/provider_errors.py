"""What can go wrong in a provider run, and how it is said.

The provider run's process; imports yapapi's errors only.
"""

from __future__ import annotations

import aiohttp
from yapapi.rest.activity import BatchError, CommandExecutionError


class RunFailed(Exception):
    """Why the run cannot go on, as its record will say."""


class LaneFailed(Exception):
    """What went wrong with one provider; others may do better."""


class Vanished(LaneFailed):
    """A provider that does not answer any more."""


def describe(error: BaseException) -> str:
    """One line for an error of yapapi or of the network, without secrets."""
    if isinstance(error, LaneFailed):
        return str(error)
    if isinstance(error, CommandExecutionError):
        return f"command failed: {error.message or error.stderr or 'no reason given'}"
    if isinstance(error, BatchError):
        return f"command failed: {' '.join(map(str, error.args)) or type(error).__name__}"
    status = getattr(error, "status", None)
    if status is not None and hasattr(error, "body"):
        return f"yagna said {status}: {str(error.body)[:200]}"
    if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
        return f"no answer ({type(error).__name__})"
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def is_gone(error: BaseException) -> bool:
    body = str(getattr(error, "body", ""))
    return getattr(error, "status", None) == 500 and "endpoint address not found" in body
