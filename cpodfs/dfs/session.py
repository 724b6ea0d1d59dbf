"""One login at a FairOS-DFS server: requests with a bearer token, logged in when needed.

Imports httpx, tenacity, trio and our errors, models. Before changing it: a request may be
repeated only when it is safe (``repeat=True``) or when it surely was not carried out (refused
connection, expired session, 429); everything else is for the caller to verify.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

import tenacity
import trio

from cpodfs.dfs import models
from cpodfs.dfs._errors import classify
from cpodfs.dfs._http import (
    bounded,
    http_client,
    pieces,
    raw_body,
    retry_after_s,
    transport_error,
    unix_time,
)
from cpodfs.dfs._httpx import httpx
from cpodfs.dfs._life import Silent, while_alive
from cpodfs.dfs._login import Login
from cpodfs.dfs._multipart import MultipartFile
from cpodfs.errors import (
    DfsError,
    NotLoggedIn,
    Overloaded,
    ServerError,
    TimedOut,
    Unreachable,
)

_LOGIN = "/v2/user/login"
_CHEAP = "/v1/user/isloggedin"
# Who is asked to wait for longer is told so, instead of being kept.
_LONGEST_WAIT_S = 30.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. ``metadata_s`` bounds a whole call, ``slow_s`` the calls that walk or copy a pod: with
    the login that it may need, its repeats, and the pauses that the server asks for. A listing gets
    ``metadata_s`` plus the time that its bytes take at ``listing_bytes_per_s``. A slow call ends also
    when the server answers nothing at all, whoever asks, for ``metadata_s``.

    Transfers have no total limit: ``idle_s`` without a byte ends them. After an upload's last
    byte the server stores the file before it answers, for which it gets ``idle_s`` plus the time
    that the file takes at ``store_bytes_per_s``.
    """

    connect_s: float = 5.0
    metadata_s: float = 30.0
    slow_s: float = 900.0
    idle_s: float = 60.0
    store_bytes_per_s: float = 100_000.0
    listing_bytes_per_s: float = 1_000_000.0


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

    A refused login is final until ``reset``; when an earlier one went well, for a time only. While
    the server asks to be left alone (``Retry-After``), no call of anybody's is made.
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
        self._password = password
        self._asking = trio.CapacityLimiter(1)  # one password helper at a time, abandoned ones too
        self._extra_attempts = extra_attempts
        self._login = Login(self._log_in)
        self._quiet_until = 0.0
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
        self._login.forget()
        await self._http.__aexit__(kind, exc, trace)

    @property
    def generation(self) -> int:
        return self._login.generation

    @property
    def logged_in(self) -> bool:
        """Whether we hold a token; the server may have forgotten it."""
        return self._login.has_token

    def reset(self) -> None:
        """Forget a refused login, so that the next call asks for the password again."""
        self._login.reset()

    def forget(self) -> None:
        """Drop the token (after a logout); the next call logs in."""
        self._login.forget()

    async def login(self) -> None:
        """Log in unless we are. Raises LoginRefused (for good, until ``reset``), LoginFailed,
        Unreachable, …"""
        await self._login.token()

    async def call(
        self,
        method: str,
        endpoint: str,
        *,
        params: Mapping[str, str] | None = None,
        payload: Mapping[str, str] | None = None,
        repeat: bool = False,
        extra_attempts: int | None = None,
        authenticated: bool = True,
        limit_s: float | None = None,
        secrets: tuple[str, ...] = (),
    ) -> bytes:
        """One JSON call; returns the body of a 2xx reply, at most 64 MiB.

        ``repeat`` says that carrying it out twice does no harm; ``extra_attempts`` are those that
        all calls get, unless it says otherwise. ``limit_s`` bounds all that it takes,
        a login and repeats too. Raises DfsError.
        """
        limit = self.timeouts.metadata_s if limit_s is None else limit_s
        body = None if payload is None else json.dumps(payload).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        sent = False

        async def exchange(token: str | None) -> bytes:
            nonlocal sent
            sent = True
            try:
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
            except DfsError as error:
                sent = not _surely_not_done(error)
                raise

        async def attempts(token: str | None) -> bytes:
            return await self._retrying(repeat, lambda: exchange(token), extra_attempts)

        async def whole() -> bytes:
            return await (self._authenticated(attempts) if authenticated else attempts(None))

        silence_s = self.timeouts.metadata_s
        try:
            with trio.move_on_after(limit):
                if limit > silence_s:
                    return await while_alive(whole, self._is_alive, silence_s)
                return await whole()
        except Silent:
            limit = silence_s
        text = f"no answer within {limit:g} s"
        raise self._count(TimedOut(text, endpoint=endpoint, sent=sent))

    async def parse(
        self,
        endpoint: str,
        make_parser: Callable[[str], models.Parser[_T]],
        params: Mapping[str, str] | None = None,
    ) -> _T:
        """One GET whose 2xx reply, of any length, is parsed as it arrives, a little at a time, so
        that nobody else waits for it. A new parser is made for each attempt. Raises DfsError.
        """

        limit = self.timeouts.metadata_s

        async def exchange(token: str | None) -> _T:
            parser = make_parser(endpoint)
            async with self._exchange(
                "GET",
                endpoint,
                token=token,
                params=params,
                headers={},
                content=None,
                timeout=self._timeout(limit),
            ) as response:
                async with aclosing(pieces(response)) as body:
                    async for piece in body:
                        begun = trio.current_time()
                        parser.feed(piece)
                        await trio.lowlevel.checkpoint()
                        # A long reply takes long to send, and to parse.
                        patience.deadline += trio.current_time() - begun
                        patience.deadline += len(piece) / self.timeouts.listing_bytes_per_s
                return parser.end()

        async def attempts(token: str | None) -> _T:
            return await self._retrying(True, lambda: exchange(token))

        with trio.move_on_after(limit) as patience:
            return await self._authenticated(attempts)
        raise self._count(TimedOut(f"no answer within {limit:g} s", endpoint=endpoint))

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

    async def _is_alive(self, limit_s: float) -> bool:
        """Whether the server answers anything, be it an error."""
        try:
            await self.call(
                "GET",
                _CHEAP,
                params={"userName": self.user},
                extra_attempts=0,
                authenticated=False,
                limit_s=limit_s,
            )
        except Unreachable:
            return False
        except DfsError:
            return True
        return True

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
        await self._leave_alone(endpoint)
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
            retry_after_s=retry_after_s(response),
            secrets=(*secrets, token or ""),
        )
        if error.retry_after_s is not None:
            until = trio.current_time() + error.retry_after_s
            self._quiet_until = max(self._quiet_until, until)
        raise self._count(error)

    async def _leave_alone(self, endpoint: str) -> None:
        """Wait as long as the server has asked to be left alone. Raises Overloaded when that is too
        long for a wait, or for the caller's time limit."""
        while (left_s := self._quiet_until - trio.current_time()) > 0:
            if not _is_worth_waiting(left_s):
                text = f"the server asks not to be called for {left_s:.0f} s"
                error = Overloaded(text, endpoint=endpoint, sent=False)
                error.retry_after_s = left_s
                raise error
            await trio.sleep(left_s)

    # -- login -----------------------------------------------------------------------------

    async def _authenticated(self, exchange: Callable[[str | None], Awaitable[_T]]) -> _T:
        """With one repeat after a new login when the session was not known (any more)."""
        token = await self._login.token()
        try:
            result = await exchange(token.text)
        except NotLoggedIn as error:
            self._login.rejected(token, error)
            token = await self._login.token()
            self.stats.repeats += 1
            try:
                result = await exchange(token.text)
            except NotLoggedIn as again:
                raise self._login.rejected(token, again) from None
        self._login.accepted(token)
        return result

    async def _log_in(self, hopeful: bool) -> str:
        # In a thread, as it may run a credential helper.
        password = await trio.to_thread.run_sync(
            self._password, abandon_on_cancel=True, limiter=self._asking
        )
        body = await self.call(
            "POST",
            _LOGIN,
            payload={"userName": self.user, "password": password},
            repeat=True,
            extra_attempts=None if hopeful else 0,
            authenticated=False,
            secrets=(password,),
        )
        self.stats.logins += 1
        return models.access_token(body, _LOGIN)

    # -- retries ---------------------------------------------------------------------------

    async def _retrying(
        self,
        repeat: bool,
        attempt: Callable[[], Awaitable[_T]],
        extra_attempts: int | None = None,
    ) -> _T:
        extra = self._extra_attempts if extra_attempts is None else extra_attempts

        def worth_repeating(exc: BaseException) -> bool:
            if not isinstance(exc, Unreachable | ServerError):
                return False
            soon = _is_worth_waiting(exc.retry_after_s or 0.0)
            return soon and (repeat or _surely_not_done(exc))

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(worth_repeating),
            stop=tenacity.stop_after_attempt(1 + extra),
            wait=tenacity.wait_random_exponential(multiplier=0.3, max=5),
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
        server = unix_time(response.headers.get("Date"))
        if server is not None:
            # The header has whole seconds, so the true time is half a second later on average.
            self.clock_skew_s = server + 0.5 - (started + time.time()) / 2

    def _count(self, error: DfsError) -> DfsError:
        self.stats.errors[type(error).__name__] += 1
        return error


def _surely_not_done(error: DfsError) -> bool:
    """Whether the server has not acted on the request; it may have got it."""
    return not error.sent or error.status == 429 or isinstance(error, NotLoggedIn)


def _is_worth_waiting(wait_s: float) -> bool:
    """Whether it is not too long, nor longer than the caller's time limit."""
    left_s = trio.current_effective_deadline() - trio.current_time()
    return wait_s <= min(_LONGEST_WAIT_S, left_s)
