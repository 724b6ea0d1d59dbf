"""The HTTP client as a session uses it, and what its failures are called here.

Imports httpx and errors. Neither redirects nor cookies nor proxies of the environment are used:
the token must go to the configured server and nowhere else.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy

from cpodfs.dfs._httpx import httpx
from cpodfs.errors import BadReply, ConfigError, TimedOut, Unreachable

_MAX_JSON = 64 * 2**20
MAX_RETRY_AFTER_S = 300.0
"""A server that asks for more is asked again sooner."""
_PIECE = 8192


def http_client(
    base_url: str, max_connections: int, transport: httpx.AsyncBaseTransport | None
) -> httpx.AsyncClient:
    """Raises ConfigError for an address that cannot be used."""
    url = _checked_url(base_url)
    return httpx.AsyncClient(
        base_url=url,
        transport=transport,
        # Without TLS there are no certificates to compare with, and loading those takes 0.1 s.
        verify=url.startswith("https:"),
        trust_env=False,
        follow_redirects=False,
        # The token is our only credential: a kept cookie would outlive a logout.
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
        headers={"Accept-Encoding": "identity", "User-Agent": "cpodfs"},
        limits=httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections
        ),
    )


def _checked_url(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, ValueError):
        raise ConfigError("the server's address is not a URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("the server's address must begin with http:// or https://")
    if url.userinfo or url.query or url.fragment:
        raise ConfigError("the server's address must be without user, query and fragment")
    return str(url)


def transport_error(exc: Exception, endpoint: str) -> Unreachable:
    unsent = isinstance(
        exc, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.InvalidURL)
    )
    kind = TimedOut if isinstance(exc, httpx.TimeoutException) else Unreachable
    text = str(exc) or type(exc).__name__
    return kind(text, endpoint=endpoint, sent=not unsent)


def raw_body(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body's bytes as sent, once. To be closed by the caller, else trio complains."""
    raw = response.aiter_raw()
    assert isinstance(raw, AsyncGenerator)
    return raw


async def bounded(response: httpx.Response, endpoint: str) -> bytes:
    body = bytearray()
    async with aclosing(raw_body(response)) as raw:
        async for chunk in raw:
            body += chunk
            if len(body) > _MAX_JSON:
                raise BadReply("reply is larger than 64 MiB", endpoint=endpoint)
    return bytes(body)


def unix_time(date: str | None) -> float | None:
    """Seconds, of a date as HTTP has it; None when it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, OverflowError):
        return None


def retry_after_s(response: httpx.Response) -> float | None:
    """How long the server asks us to wait, in seconds or by a date of its own clock; bounded."""
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isascii() and asked.isdigit():
        return min(float(asked[:9]), MAX_RETRY_AFTER_S)
    until = unix_time(asked)
    if until is None:
        return None
    now = unix_time(response.headers.get("Date"))
    return min(max(until - (time.time() if now is None else now), 0.0), MAX_RETRY_AFTER_S)


async def pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body of a reply, of any length, in pieces that are soon parsed."""
    async with aclosing(raw_body(response)) as raw:
        async for chunk in raw:
            for start in range(0, len(chunk), _PIECE):
                yield chunk[start : start + _PIECE]
