"""Who is logged in: bearer tokens, cookies, and which pods each session has open.

Imports ``dfs_model`` and ``dfs_store``. All of it lives in memory with a secret drawn at start, so a
restart ends every session, as at the real server. The messages are the real server's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from cpodfs.devnet.dfs_model import NOT_LOGGED_IN, Refusal
from cpodfs.devnet.dfs_store import User

COOKIE = "fairOS-dfs"
_COOKIE_LIFETIME_S = 3600.0
_JWT_HEADER = {"alg": "HS256", "typ": "JWT"}


class Unauthorized(Exception):
    """The middleware's refusal; ``str()`` is the message."""


@dataclass
class Session:
    """``open_pods``: names opened by this session.

    ``tagged``: files that it uploaded, and when (monotonic, s), ``listed``: directories in its
    memory, both by (pod, path).
    What it has in ``memory`` of a pod, by (kind, path), needs no chunk until it closes the pod; the
    value says how many of the newest entries of a directory's list, or versions of a file, it
    did not see.
    """

    id: str
    user: User
    open_pods: set[str] = field(default_factory=set)
    tagged: dict[tuple[str, str], float] = field(default_factory=dict)
    listed: set[tuple[str, str]] = field(default_factory=set)
    _memory: dict[str, dict[tuple[str, str], int]] = field(default_factory=dict)

    def memory(self, pod: str) -> dict[tuple[str, str], int]:
        """Of the pod with this address."""
        return self._memory.setdefault(pod, {})

    def forget(self, pod: str) -> None:
        """Close the pod that has this address."""
        self._memory.pop(pod, None)
        self.tagged = {key: at for key, at in self.tagged.items() if key[0] != pod}
        self.listed = {(other, path) for other, path in self.listed if other != pod}


class Sessions:
    """``token_lifetime_s``: seconds until a bearer token expires."""

    def __init__(self, token_lifetime_s: float) -> None:
        self._lifetime_s = token_lifetime_s
        self._secret = secrets.token_bytes(64)
        self._sessions: dict[str, Session] = {}

    def new(self, user: User) -> Session:
        session = Session(secrets.token_hex(16), user)
        self._sessions[session.id] = session
        return session

    def need(self, session_id: str) -> Session:
        """Raises Refusal when the server no longer knows the session."""
        session = self._sessions.get(session_id)
        if session is None:
            raise Refusal(NOT_LOGGED_IN)
        return session

    def drop(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)

    def is_logged_in(self, user: str) -> bool:
        return any(session.user.name == user for session in self._sessions.values())

    def expire_all(self, *, tokens_too: bool) -> None:
        """End every session. ``tokens_too``: their tokens become invalid (401), else unknown."""
        self._sessions.clear()
        if tokens_too:
            self._secret = secrets.token_bytes(64)

    def token(self, session: Session) -> str:
        claims = {
            "iss": "dfs",
            "exp": int(time.time() + self._lifetime_s),
            "sessionId": session.id,
        }
        signed = f"{_encode(_JWT_HEADER)}.{_encode(claims)}"
        return f"{signed}.{self._signature(signed)}"

    def set_cookie(self, response: web.StreamResponse, session: Session) -> None:
        value = _encode({"session-id": session.id, "login-time": time.time() + _COOKIE_LIFETIME_S})
        response.set_cookie(
            COOKIE,
            f"{value}.{self._signature(value)}",
            path="/",
            httponly=True,
            secure=True,
            samesite="None",
        )

    def authenticate(self, request: web.Request) -> str:
        """The session id that the request claims rightly. Raises Unauthorized."""
        parts = request.headers.get("Authorization", "").split("Bearer")
        if len(parts) == 2 and parts[1].strip():
            return self._from_token(parts[1].strip())
        return self._from_cookie(request.cookies.get(COOKIE))

    def _from_token(self, token: str) -> str:
        signed, _, signature = token.rpartition(".")
        if not self._is_ours(signed, signature):
            raise Unauthorized("jwt: invalid token")
        claims = _decode(signed.partition(".")[2])
        if claims["exp"] <= time.time():
            raise Unauthorized("jwt: invalid token")
        return str(claims["sessionId"])

    def _from_cookie(self, cookie: str | None) -> str:
        if cookie is None:
            raise Unauthorized("cookie: invalid cookie: http: named cookie not present")
        value, _, signature = cookie.rpartition(".")
        if not self._is_ours(value, signature):
            raise Unauthorized("cookie: invalid cookie: securecookie: the value is not valid")
        claims = _decode(value)
        session_id = str(claims["session-id"])
        if claims["login-time"] < time.time() and session_id in self._sessions:
            self.drop(session_id)
            raise Unauthorized("logging out as cookie login timeout expired")
        return session_id

    def _is_ours(self, text: str, signature: str) -> bool:
        claimed = signature.encode("utf-8", "surrogateescape")
        return hmac.compare_digest(self._signature(text).encode(), claimed)

    def _signature(self, text: str) -> str:
        digest = hmac.new(self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256)
        return base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


def _encode(claims: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()


def _decode(text: str) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return claims
