"""Turns an error reply of the server into exactly one class of errors.py: one table, in order.

Imports errors and models. Status codes are coarse, so the text decides. Only known texts mean
"not found": a proxy's 404 or a failed look-up must never make the caller believe in a deletion.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpodfs.dfs import models
from cpodfs.errors import (
    AlreadyExists,
    BadReply,
    Denied,
    DfsError,
    LoginRefused,
    NoSuchUser,
    NotFound,
    NotLoggedIn,
    Overloaded,
    PodNotFound,
    PodNotOpen,
    QuotaExceeded,
    ReadOnlyPod,
    Refused,
    ServerError,
    TooLong,
)

_SHOWN = 300


@dataclass(frozen=True, slots=True)
class _Rule:
    """Matches when the path starts with ``endpoint`` and the message contains ``text``."""

    meaning: type[DfsError]
    text: str = ""
    endpoint: str = ""
    status: frozenset[int] = frozenset()

    def matches(self, endpoint: str, status: int, message: str) -> bool:
        return (
            endpoint.startswith(self.endpoint)
            and (not self.status or status in self.status)
            and self.text in message
        )


def _rules(meaning: type[DfsError], *texts: str, endpoint: str = "") -> tuple[_Rule, ...]:
    return tuple(_Rule(meaning, text, endpoint) for text in texts)


class StatusUnknown(Refused):
    """The server keeps no record of how much of the file Swarm has."""


_LOGIN = "/v2/user/login"
_TABLE: tuple[_Rule, ...] = (
    _Rule(NoSuchUser, "no user available", _LOGIN),
    *_rules(
        LoginRefused,
        "invalid password",
        "invalid user name",
        "argument missing",
        endpoint=_LOGIN,
    ),
    *_rules(Refused, "invalid password", "error downloading data", endpoint="/v2/user/delete"),
    _Rule(NotLoggedIn, status=frozenset({401})),
    *_rules(NotLoggedIn, "user not logged-in"),
    _Rule(NotLoggedIn, "unauthorized", status=frozenset({400})),
    *_rules(PodNotOpen, "pod not open"),
    *_rules(ReadOnlyPod, "read only pod", "read only feed"),
    *_rules(
        AlreadyExists,
        "already exist",
        "already present",
        "with fork name already",
    ),
    *_rules(PodNotFound, "pod does not exist", "could not find pod"),
    *_rules(PodNotFound, "pod not found", endpoint="/v1/pod/"),
    *_rules(NotFound, "no user available"),
    *_rules(NotFound, "directory not present", "dir not found", endpoint="/v1/"),
    *_rules(
        NotFound,
        "file not found in dfs",
        "file does not exist",
        "file not present",
        "deleted feed",
        endpoint="/v1/file/",
    ),
    *_rules(StatusUnknown, "file status is not available", endpoint="/v1/file/status"),
    *_rules(NotFound, "feed does not exist", endpoint="/v1/file/share"),
    *_rules(NotFound, "Not Found", endpoint="/v1/pod/receive"),
    *_rules(NotFound, "Not Found", endpoint="/v1/file/receive"),
    *_rules(QuotaExceeded, "max number of pods", "maximum number of pods"),
    _Rule(QuotaExceeded, status=frozenset({402})),
    *_rules(TooLong, "pod name too long", "too long directory name", "directory name too long"),
    *_rules(
        Refused,
        "block size must be",
        "invalid directory name",
        "invalid file or directory name",
        "pod name cannot be blank",
        "password should be at least",
        "is blank",
        "cannot rename root dir",
        "invalid reference",
        "argument missing",
    ),
)


def classify(
    endpoint: str,
    status: int,
    body: bytes,
    *,
    retry_after_s: float | None = None,
    secrets: tuple[str, ...] = (),
) -> DfsError:
    """The one error that this reply means; ``secrets`` are blotted out of the server's text."""
    said = models.error_message(body)
    message = _presentable(said or f"HTTP {status}", secrets)
    error = _meaning(endpoint, status, said)(message, endpoint=endpoint, status=status)
    if status == 429 or status >= 500:
        error.retry_after_s = retry_after_s
    return error


def _meaning(endpoint: str, status: int, said: str | None) -> type[DfsError]:
    if status in (429, 503):
        return Overloaded
    if said is not None or status in (401, 402):
        for rule in _TABLE:
            if rule.matches(endpoint, status, said or ""):
                return rule.meaning
    if status >= 500:
        return ServerError
    if said is None or status in (404, 405) or status < 400:
        return BadReply
    return Denied if status == 403 else Refused


def upload_refusal(complaint: str, endpoint: str) -> DfsError:
    """For a 200 whose ``Responses`` say that the one file was not stored."""
    message = _presentable(complaint, ())
    for rule in _TABLE:
        if rule.matches(endpoint, 200, complaint):
            return rule.meaning(message, endpoint=endpoint, status=200)
    return ServerError(message, endpoint=endpoint, status=200)


def _presentable(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    clean = "".join(char if char.isprintable() else "?" for char in text[:_SHOWN])
    return clean + ("…" if len(text) > _SHOWN else "")
