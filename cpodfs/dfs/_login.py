"""The session's login: whoever needs a token gets one, and however many need it, one login is made.

Imports the single flight and errors. A login may lead nowhere: it is refused, or fails, or the next
call shows that its token is worth nothing. After each one in a row the pause before the next is
longer, for all; who needs a token meanwhile gets the error at once. A password thus leaves this
machine seldom, whatever the server answers. Only ``token`` awaits; all else is one synchronous step.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from cpodfs.dfs._flight import SingleFlight
from cpodfs.errors import DfsError, LoginFailed, LoginRefused, NotLoggedIn, Unreachable

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
REFUSED_PAUSE_S = 60.0
"""A server whose own network is down calls a good password invalid, so what has worked before is
tried again after this time."""
LONGEST_REFUSED_PAUSE_S = 300.0
WORTH_WAITING_S = 2.0
"""A pause of so much is waited for; for a longer one the caller is told."""
BURST, BURST_S, SPACING_S = 60, 60.0, 1.0
"""Of sessions that end soon: so many in this time, then one each ``SPACING_S``."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Token:
    """What a login gave. Two logins may give the same text."""

    text: str


class Login:
    """``log_in(hopeful)`` makes the call and returns the token's text; ``hopeful``: the last login
    went well, so that an error of the server's may be a passing one and is worth a repeat."""

    def __init__(self, log_in: Callable[[bool], Awaitable[str]]) -> None:
        self._log_in = log_in
        self._flights = SingleFlight()
        self._token: Token | None = None
        self._proved = False
        self._fruitless = 0
        self._failure: DfsError | None = None
        self._not_before = -math.inf
        self._recent: deque[float] = deque(maxlen=BURST)
        self.generation = 0
        """How many logins went well."""

    @property
    def has_token(self) -> bool:
        return self._token is not None

    def forget(self) -> None:
        """Drop the token; whoever needs one logs in."""
        self._token = None

    def reset(self) -> None:
        """As if no login had been made: the next one needs no pause."""
        self._token = None
        self._fruitless, self._failure, self._not_before = 0, None, -math.inf

    async def token(self) -> Token:
        """Raises LoginRefused, LoginFailed, NotLoggedIn, Unreachable; ``sent`` is False, as the call
        that the token was for was not made."""
        while self._token is None:
            await self._pause()
            await self._flights.do("login", self._run)
        return self._token

    def accepted(self, token: Token) -> None:
        """The server carried out a call with it."""
        if token is self._token:
            self._proved = True
            self._fruitless, self._failure = 0, None

    def rejected(self, token: Token, error: NotLoggedIn) -> NotLoggedIn:
        """The server does not know it (any more); returns the error to raise should that be all."""
        if token is not self._token:
            return error
        self._token = None
        if self._proved:
            return error
        clear = NotLoggedIn(
            f"the server refuses the session that it has just given ({error.message})",
            endpoint=error.endpoint,
            status=error.status,
        )
        self._note_fruitless(clear)
        return clear

    async def _pause(self) -> None:
        left_s = self._not_before - trio.current_time()
        if left_s > WORTH_WAITING_S and self._failure is not None:
            raise self._again(self._failure, left_s)
        if left_s > 0:
            await trio.sleep(left_s)

    async def _run(self) -> None:
        try:
            text = await self._log_in(self._fruitless == 0)
        except (LoginRefused, Unreachable) as error:
            error.sent = False
            if isinstance(error, LoginRefused):
                self._note_fruitless(error)
            raise
        except DfsError as error:
            failure = LoginFailed(error.message, endpoint=error.endpoint, status=error.status)
            failure.sent, failure.retry_after_s = False, error.retry_after_s
            self._note_fruitless(failure)
            raise failure from error
        self.generation += 1
        self._token, self._proved = Token(text), False
        now = trio.current_time()
        if len(self._recent) == BURST and now - self._recent[0] < BURST_S:
            self._not_before = now + SPACING_S
        self._recent.append(now)

    def _note_fruitless(self, error: DfsError) -> None:
        self._fruitless += 1
        self._failure = error
        doublings = min(self._fruitless - 1, 16)
        if isinstance(error, LoginRefused):
            lasts_s = min(REFUSED_PAUSE_S * 2**doublings, LONGEST_REFUSED_PAUSE_S)
            pause_s = lasts_s if self.generation else math.inf
        elif isinstance(error, LoginFailed):
            pause_s = min(FIRST_PAUSE_S * 2**doublings, LONGEST_PAUSE_S)
        else:
            # A token may grow old unused: the first one that is worth nothing proves nothing.
            pause_s = min(FIRST_PAUSE_S * 2.0 ** (doublings - 1), LONGEST_PAUSE_S)
            pause_s = pause_s if doublings else 0.0
        pause_s = max(pause_s, error.retry_after_s or 0.0)
        self._not_before = trio.current_time() + pause_s
        if pause_s < math.inf:
            error.retry_after_s = pause_s

    def _again(self, failure: DfsError, left_s: float) -> DfsError:
        """What the last login came to, for somebody who comes before the next."""
        error = copy.copy(failure)
        error.sent = False
        if left_s < math.inf:
            error.retry_after_s = left_s
            error.args = (f"{failure}; the next login is due in {left_s:.0f} s",)
        return error
