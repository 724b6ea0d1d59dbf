"""One login at a FairOS-DFS server: requests with a bearer token, logged in when needed.

Imports httpx, tenacity, trio and our errors, models. Before changing it: a request may be
repeated only when it is safe (``repeat=True``) or when it surely was not carried out (refused
connection, expired session, 429); everything else is for the caller to verify.
"""

from __future__ import annotations

import email.utils
import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

import httpx
import tenacity
import trio

from cpodfs.dfs import models
from cpodfs.dfs._errors import classify
from cpodfs.dfs._flight import SingleFlight
from cpodfs.dfs._http import bounded, http_client, raw_body, transport_error
from cpodfs.dfs._multipart import MultipartFile
from cpodfs.errors import (
    DfsError,
    LoginRefused,
    NotLoggedIn,
    Overloaded,
    ServerError,
    TimedOut,
    Unreachable,
)

_LOGIN = "/v2/user/login"
# Who is asked to wait for longer is told so, instead of being kept.
_LONGEST_WAIT_S = 30.0
# A server whose own network is down calls a good password invalid, so what has worked before is
# tried again after this time.
_REFUSAL_LASTS_S = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. ``metadata_s`` bounds a whole call, ``slow_s`` the calls that walk or copy a pod.

    Transfers have no total limit: ``idle_s`` without a byte ends them. After an upload's last
    byte the server stores the file before it answers, for which it gets ``idle_s`` plus the time
    that the file takes at ``store_bytes_per_s``.
    """

    connect_s: float = 5.0
    metadata_s: float = 30.0
    slow_s: float = 900.0
    idle_s: float = 60.0
    store_bytes_per_s: float = 100_000.0


@dataclass(slots=True)
class Stats:
    """Since the session was made. Calls and errors count single HTTP exchanges, repeats too.

    ``calls`` by path, ``errors`` by class name; bytes are those of file contents only. ``recent``:
    when the latest calls began, in trio's time.
    """

    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    logins: int = 0
    repeats: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def calls_per_s(self, window_s: float = 10.0) -> float:
        """The rate over the last seconds; over as many as are remembered, when calls come fast."""
        now = trio.current_time()
        begun = sum(now - at <= window_s for at in self.recent)
        if begun == self.recent.maxlen:
            window_s = max(now - self.recent[0], 0.001)
        return begun / window_s


class Session:
    """An async context manager, for trio. Safe to use from many tasks.

    ``password`` is called once per login and its result is not kept. ``generation`` grows with
    every login: what the server remembered for us (open pods) is gone then. ``clock_skew_s`` is
    the server's clock minus ours, to about a second, None before the first answer. Keep fewer
    transfers going than ``max_connections``, or all other calls wait for them.

    A refused login is final until ``reset``; when an earlier one went well, for a minute only.
    """

    def __init__(
        self,
        base_url: str,
        user: str,
        password: Callable[[], str],
        *,
        timeouts: Timeouts | None = None,
        max_connections: int = 32,
        extra_attempts: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.user = user
        self.stats = Stats()
        self.timeouts = timeouts or Timeouts()
        self.clock_skew_s: float | None = None
        self.generation = 0
        self._password = password
        self._extra_attempts = extra_attempts
        self._token: str | None = None
        self._refused: LoginRefused | None = None
        self._refused_until = 0.0
        self._logins = SingleFlight()
        self._http = http_client(base_url, max_connections, transport)
        self._base_url = str(self._http.base_url)

    def __repr__(self) -> str:
        return f"Session({self._base_url!r}, user={self.user!r})"

    async def __aenter__(self) -> Self:
        # These loggers would write URLs with sharing references and headers with cookies.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._token = None
        await self._http.__aexit__(kind, exc, trace)

    @property
    def logged_in(self) -> bool:
        """Whether we hold a token; the server may have forgotten it."""
        return self._token is not None

    def reset(self) -> None:
        """Forget a refused login, so that the next call asks for the password again."""
        self._refused = None
        self._token = None

    def forget(self) -> None:
        """Drop the token (after a logout); the next call logs in."""
        self._token = None

    async def login(self) -> None:
        """Log in unless we are. Raises LoginRefused (for good, until ``reset``), Unreachable, …"""
        await self._ensure_token(None)

    async def call(
        self,
        method: str,
        endpoint: str,
        *,
        params: Mapping[str, str] | None = None,
        payload: Mapping[str, str] | None = None,
        repeat: bool = False,
        authenticated: bool = True,
        limit_s: float | None = None,
        secrets: tuple[str, ...] = (),
    ) -> bytes:
        """One JSON call; returns the body of a 2xx reply, at most 64 MiB.

        ``repeat`` says that carrying it out twice does no harm. Raises DfsError.
        """
        limit = self.timeouts.metadata_s if limit_s is None else limit_s
        body = None if payload is None else json.dumps(payload).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}

        async def exchange(token: str | None) -> bytes:
            with trio.move_on_after(limit):
                async with self._exchange(
                    method,
                    endpoint,
                    token=token,
                    params=params,
                    headers=headers,
                    content=body,
                    timeout=self._timeout(limit),
                    secrets=secrets,
                ) as response:
                    return await bounded(response, endpoint)
            raise self._count(TimedOut(f"no answer within {limit:g} s", endpoint=endpoint))

        async def attempts(token: str | None) -> bytes:
            return await self._retrying(repeat, lambda: exchange(token))

        return await (self._authenticated(attempts) if authenticated else attempts(None))

    async def send_file(self, endpoint: str, make_body: Callable[[], MultipartFile]) -> bytes:
        """Stream a multipart body, made anew for each attempt; never repeated once carried out.

        What the body's source raises comes out unchanged, and the server saw no end of the body.
        """

        async def attempts(token: str | None) -> bytes:
            return await self._retrying(
                False, lambda: self._send_body(endpoint, make_body(), token)
            )

        return await self._authenticated(attempts)

    @asynccontextmanager
    async def open_stream(
        self, endpoint: str, params: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """A GET whose 2xx body the caller reads; only its opening is repeated."""

        async def attempts(token: str | None) -> httpx.Response:
            return await self._retrying(True, lambda: self._opened(endpoint, params, token))

        response = await self._authenticated(attempts)
        try:
            yield response
        finally:
            await response.aclose()

    async def chunks(self, response: httpx.Response, endpoint: str) -> AsyncGenerator[bytes, None]:
        """The raw body of an ``open_stream``; raises Unreachable when the connection is lost."""
        try:
            async with aclosing(raw_body(response)) as raw:
                async for chunk in raw:
                    self.stats.bytes_down += len(chunk)
                    yield chunk
        except httpx.TransportError as exc:
            raise self._count(transport_error(exc, endpoint)) from None

    # -- one exchange ----------------------------------------------------------------------

    async def _opened(
        self, endpoint: str, params: Mapping[str, str], token: str | None
    ) -> httpx.Response:
        response = await self._send(
            "GET",
            endpoint,
            token=token,
            params=params,
            headers={},
            content=None,
            timeout=self._timeout(self.timeouts.idle_s),
        )
        try:
            await self._refuse_errors(response, endpoint, token, ())
        except BaseException:
            await response.aclose()
            raise
        return response

    async def _send_body(self, endpoint: str, body: MultipartFile, token: str | None) -> bytes:
        answer_s = self.timeouts.idle_s + body.content_length / self.timeouts.store_bytes_per_s
        try:
            async with aclosing(body.stream()) as content:
                async with self._exchange(
                    "POST",
                    endpoint,
                    token=token,
                    headers={
                        "Content-Type": body.content_type,
                        "Content-Length": str(body.content_length),
                    },
                    content=content,
                    timeout=self._timeout(self.timeouts.idle_s, read_s=answer_s),
                ) as response:
                    return await bounded(response, endpoint)
        except Exception:
            if body.failure is not None:
                raise body.failure from None
            raise
        finally:
            self.stats.bytes_up += body.sent

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        endpoint: str,
        *,
        token: str | None,
        headers: Mapping[str, str],
        content: bytes | AsyncIterator[bytes] | None,
        timeout: httpx.Timeout,
        params: Mapping[str, str] | None = None,
        secrets: tuple[str, ...] = (),
    ) -> AsyncIterator[httpx.Response]:
        response = await self._send(
            method,
            endpoint,
            token=token,
            params=params,
            headers=headers,
            content=content,
            timeout=timeout,
        )
        try:
            await self._refuse_errors(response, endpoint, token, secrets)
            yield response
        except httpx.TransportError as exc:
            raise self._count(transport_error(exc, endpoint)) from None
        finally:
            await response.aclose()

    async def _send(
        self,
        method: str,
        endpoint: str,
        *,
        token: str | None,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str],
        content: bytes | AsyncIterator[bytes] | None,
        timeout: httpx.Timeout,
    ) -> httpx.Response:
        bearer = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.stats.calls[endpoint] += 1
        self.stats.recent.append(trio.current_time())
        started = time.time()
        try:
            request = self._http.build_request(
                method,
                endpoint,
                params=params,
                headers={**headers, **bearer},
                content=content,
                timeout=timeout,
            )
            response = await self._http.send(request, stream=True)
        except (httpx.TransportError, httpx.InvalidURL) as exc:
            raise self._count(transport_error(exc, endpoint)) from None
        self._note_clock(response, started)
        return response

    async def _refuse_errors(
        self, response: httpx.Response, endpoint: str, token: str | None, secrets: tuple[str, ...]
    ) -> None:
        if response.is_success:
            return
        body = await bounded(response, endpoint)
        error = classify(
            endpoint,
            response.status_code,
            body,
            retry_after=response.headers.get("Retry-After"),
            secrets=(*secrets, token or ""),
        )
        raise self._count(error)

    # -- login -----------------------------------------------------------------------------

    async def _authenticated(self, exchange: Callable[[str | None], Awaitable[_T]]) -> _T:
        token = await self._ensure_token(None)
        try:
            return await exchange(token)
        except LoginRefused:
            raise
        except NotLoggedIn:
            self.stats.repeats += 1
            return await exchange(await self._ensure_token(token))

    async def _ensure_token(self, stale: str | None) -> str:
        """A token other than ``stale``. However many tasks ask, one login is made."""
        while self._token is None or self._token == stale:
            if self._refused is not None and trio.current_time() < self._refused_until:
                raise LoginRefused(
                    self._refused.message, endpoint=_LOGIN, status=self._refused.status
                )
            await self._logins.do("login", self._log_in)
        return self._token

    async def _log_in(self) -> None:
        self._token = None
        # In a thread, as it may run a credential helper.
        password = await trio.to_thread.run_sync(self._password)
        try:
            body = await self.call(
                "POST",
                _LOGIN,
                payload={"userName": self.user, "password": password},
                repeat=True,
                authenticated=False,
                secrets=(password,),
            )
        except LoginRefused as exc:
            self._refused = exc
            lasts_s = _REFUSAL_LASTS_S if self.generation else math.inf
            self._refused_until = trio.current_time() + lasts_s
            raise
        self._token = models.access_token(body, _LOGIN)
        self.generation += 1
        self.stats.logins += 1

    # -- retries ---------------------------------------------------------------------------

    async def _retrying(self, repeat: bool, attempt: Callable[[], Awaitable[_T]]) -> _T:
        def worth_repeating(exc: BaseException) -> bool:
            if isinstance(exc, Unreachable):
                return repeat or not exc.sent
            if isinstance(exc, Overloaded):
                soon = (exc.retry_after_s or 0) <= _LONGEST_WAIT_S
                return soon and (repeat or exc.status == 429)
            return repeat and isinstance(exc, ServerError)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(worth_repeating),
            stop=tenacity.stop_after_attempt(1 + self._extra_attempts),
            wait=_wait,
            sleep=trio.sleep,
            before_sleep=self._note_repeat,
            reraise=True,
        )

        async def run() -> _T:  # tenacity does not await what a lambda returns
            return await attempt()

        return await retrying(run)

    def _note_repeat(self, _state: tenacity.RetryCallState) -> None:
        self.stats.repeats += 1

    # -- small things ----------------------------------------------------------------------

    def _timeout(self, quiet_s: float, read_s: float | None = None) -> httpx.Timeout:
        return httpx.Timeout(
            connect=min(self.timeouts.connect_s, quiet_s),
            read=quiet_s if read_s is None else read_s,
            write=quiet_s,
            pool=quiet_s,
        )

    def _note_clock(self, response: httpx.Response, started: float) -> None:
        date = response.headers.get("Date")
        try:
            server = email.utils.parsedate_to_datetime(date).timestamp() if date else None
        except (ValueError, OverflowError):
            server = None
        if server is not None:
            # The header has whole seconds, so the true time is half a second later on average.
            self.clock_skew_s = server + 0.5 - (started + time.time()) / 2

    def _count(self, error: DfsError) -> DfsError:
        self.stats.errors[type(error).__name__] += 1
        return error


_backoff = tenacity.wait_random_exponential(multiplier=0.3, max=5)


def _wait(state: tenacity.RetryCallState) -> float:
    exc = state.outcome.exception() if state.outcome is not None else None
    asked = exc.retry_after_s if isinstance(exc, Overloaded) else None
    return _backoff(state) if asked is None else asked
