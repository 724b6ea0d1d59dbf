"""What can go wrong in a provider run, and how it is said.

The provider run's process; imports yapapi's errors only.
"""

from __future__ import annotations

import aiohttp


class RunFailed(Exception):
    """Why the run cannot go on, as its record will say."""


class LaneFailed(Exception):
    """What went wrong with one provider; others may do better."""


class Vanished(LaneFailed):
    """A provider that does not answer any more."""


class CommandFailed(LaneFailed):
    """A command that the provider could not carry out; ``message`` and ``stderr`` are its words."""

    def __init__(self, message: str | None, stderr: str | None) -> None:
        said = (stderr or "").strip().splitlines()
        words = [text for text in (message, said[-1] if said else None) if text]
        super().__init__(f"command failed: {': '.join(words) or 'no reason given'}")


def describe(error: BaseException) -> str:
    """One line for an error of yapapi or of the network, without secrets."""
    if isinstance(error, LaneFailed):
        return str(error)
    status = getattr(error, "status", None)
    if status is not None and hasattr(error, "body"):
        return f"yagna said {status}: {str(error.body)[:200]}"
    if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
        return f"no answer ({type(error).__name__})"
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def is_gone(error: BaseException) -> bool:
    """Whether yagna says that the provider is not to be found in the network."""
    return _says(error, 500, "endpoint address not found")


def is_lost(error: BaseException) -> bool:
    """Whether yagna says that it knows nothing of an activity."""
    return _says(error, 404) or _says(error, 410) or _says(error, 500, "DAO error: Not found")


def _says(error: BaseException, status: int, words: str = "") -> bool:
    return getattr(error, "status", None) == status and words in str(getattr(error, "body", ""))


def is_silence(error: BaseException) -> bool:
    """Whether a call failed for want of an answer: yagna's, or the provider's as yagna says."""
    status = getattr(error, "status", None)
    says_so = isinstance(status, int) and hasattr(error, "body") and status >= 500
    return says_so or is_unanswered(error)


def is_unanswered(error: BaseException) -> bool:
    """Whether it cannot be told what became of a call."""
    unanswered = isinstance(error, aiohttp.ClientError | TimeoutError | OSError)
    return unanswered or getattr(error, "status", None) == 408
