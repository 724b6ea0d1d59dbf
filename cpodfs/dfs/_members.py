"""A JSON object whose arrays are parsed as they arrive, one item after another.

A leaf: imports only the standard library. For replies with a million entries, which as a whole would
take seconds and gigabytes. Each item is decoded by the library's scanner in one go; only what holds
the items together is read here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Generator
from typing import Any

MAX_ITEM = 1 << 20
"""Characters of one item of an array, or of a member that is not read as one."""
_MAX_DIGITS = 20
_SPACE = re.compile(r"[ \t\n\r]*")


def _integer(digits: str) -> int:
    """A number that none of the server's can be is not worth the time to convert it."""
    return int(digits) if len(digits) <= _MAX_DIGITS else -1


_decode = json.JSONDecoder(strict=False, parse_int=_integer).raw_decode


class Members:
    """``take(name, item)`` gets the items of the arrays called ``arrays``, in the order in which they
    come. Such a member may also be null or missing; all others are ignored.

    ``feed`` and ``end`` raise ValueError for what is not such an object. What is not UTF-8 becomes
    lone surrogates in the strings that hold it. ``found``: which of ``arrays`` there were so far.
    """

    def __init__(self, arrays: Collection[str], take: Callable[[str, Any], None]) -> None:
        self._arrays = arrays
        self._take = take
        self.found: set[str] = set()
        self._bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0
        self._wanted = 0  # characters without which it is in vain to try again
        self._ended = False
        self._reading = self._object()

    def feed(self, data: bytes) -> None:
        """Read on. Takes time in proportion to the data, so feed little at once."""
        self._read(self._bytes.decode(data))

    def end(self) -> None:
        """There is no more data."""
        self._ended = True
        self._read(self._bytes.decode(b"", final=True))

    def _read(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0
        if self._ended or len(self._text) >= self._wanted:
            next(self._reading, None)

    # -- the grammar: each rule yields when it needs more text ------------------------------------

    def _object(self) -> Generator[None, None, None]:
        yield from self._one_of("{")
        if (yield from self._peek()) == "}":
            self._at += 1
        else:
            yield from self._member()
            while (yield from self._one_of(",}")) == ",":
                yield from self._member()
        while self._at < len(self._text) or not self._ended:
            self._skip_space()
            if self._at < len(self._text):
                raise ValueError("something comes after its end")
            if not self._ended:
                yield

    def _member(self) -> Generator[None, None, None]:
        name = yield from self._value()
        if not isinstance(name, str):
            raise ValueError("a member without a name")  # noqa: TRY004 - it is what JSON raises
        yield from self._one_of(":")
        if name not in self._arrays:
            yield from self._value()
            return
        self.found.add(name)
        if (yield from self._peek()) == "[":
            yield from self._items(name)
        elif (yield from self._value()) is not None:
            raise ValueError(f"{name} is no array")

    def _items(self, name: str) -> Generator[None, None, None]:
        self._at += 1
        if (yield from self._peek()) == "]":
            self._at += 1
            return
        self._take(name, (yield from self._value()))
        while (yield from self._one_of(",]")) == ",":
            self._take(name, (yield from self._value()))

    def _value(self) -> Generator[None, None, Any]:
        yield from self._peek()
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except (ValueError, RecursionError):  # or not all of it is here
                end = len(self._text)
            if end < len(self._text):  # a number that reaches to the end may go on
                self._at = end
                return value
            held = len(self._text) - self._at
            if self._ended or held > MAX_ITEM:
                raise ValueError("something is not JSON, or too long")
            self._wanted = 2 * held
            yield
            self._wanted = 0

    def _one_of(self, characters: str) -> Generator[None, None, str]:
        found = yield from self._peek()
        if found not in characters:
            raise ValueError(f"no {' or '.join(characters)} where one is due")
        self._at += 1
        return found

    def _peek(self) -> Generator[None, None, str]:
        self._skip_space()
        while self._at == len(self._text):
            if self._ended:
                raise ValueError("it ends in the middle")
            yield
            self._skip_space()
        return self._text[self._at]

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()
