"""The filter language of Golem demands and offers: parsed once, evaluated against properties.

Imports only ``cpodfs.errors``. The language is that of LDAP filters (RFC 4515) with ``<`` and
``>`` besides, as yagna's market reads it. A property that is missing makes a comparison
*unknown* (None), not false, so that its negation does not match either (Kleene's logic).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from cpodfs.errors import CpodfsError

Properties = Mapping[str, Any]

MAX_DEPTH = 64
"""Nesting beyond this is refused, so that a hostile filter cannot exhaust the stack."""

_COMPARISON = re.compile(r"\s*([^=<>!()\s]+)\s*(<=|>=|!=|=|<|>)")
_TYPE_SUFFIX = re.compile(r"@[a-z]+$")


class ConstraintError(CpodfsError):
    """The filter cannot be read; the message names the place."""


class Filter:
    """A parsed filter. ``matches`` is True only when the truth is known to be yes."""

    def truth(self, properties: Properties) -> bool | None:
        """True, False, or None when a property that decides it is missing."""
        raise NotImplementedError

    def matches(self, properties: Properties) -> bool:
        return self.truth(properties) is True


@dataclass(frozen=True)
class And(Filter):
    parts: tuple[Filter, ...]

    def truth(self, properties: Properties) -> bool | None:
        found = [part.truth(properties) for part in self.parts]
        if False in found:
            return False
        return None if None in found else True


@dataclass(frozen=True)
class Or(Filter):
    parts: tuple[Filter, ...]

    def truth(self, properties: Properties) -> bool | None:
        found = [part.truth(properties) for part in self.parts]
        if True in found:
            return True
        return None if None in found else False


@dataclass(frozen=True)
class Not(Filter):
    part: Filter

    def truth(self, properties: Properties) -> bool | None:
        found = self.part.truth(properties)
        return None if found is None else not found


@dataclass(frozen=True)
class Compare(Filter):
    """``name op value``; ``name`` may end in a type, ``@v`` (version) or ``@d`` (date)."""

    name: str
    op: str
    value: str

    def truth(self, properties: Properties) -> bool | None:
        actual = _look_up(properties, self.name)
        if actual is None:
            return None
        if self.op in {"=", "!="} and self.value == "*":
            return self.op == "="
        if isinstance(actual, list | tuple):
            return self._among(list(actual))
        return _compare(actual, self.op, self.value, versions=self.name.endswith("@v"))

    def _among(self, actual: list[Any]) -> bool | None:
        if self.value.startswith("[") and self.op in {"=", "!="}:
            wanted = [item.strip().strip("\"'") for item in self.value[1:-1].split(",")]
            equal = [str(item) for item in actual] == [item for item in wanted if item]
            return equal == (self.op == "=")
        if self.op == "!=":
            return not any(_compare(item, "=", self.value) for item in actual)
        return any(_compare(item, self.op, self.value) for item in actual)


def parse(text: str) -> Filter:
    """Read a filter; an empty one, ``()`` and ``(&)`` match everything. Raises ConstraintError."""
    if not text.strip():
        return And(())
    parser = _Parser(text)
    found = parser.filter(0)
    parser.skip_blanks()
    if parser.at < len(text):
        raise ConstraintError(f"something is left over at {parser.where()}")
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def where(self) -> str:
        return f"character {self.at}: {self.text[self.at : self.at + 20]!r}"

    def skip_blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        self.skip_blanks()
        return self.text[self.at : self.at + 1]

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise ConstraintError(f"{char!r} is expected at {self.where()}")
        self.at += 1

    def filter(self, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise ConstraintError(f"more than {MAX_DEPTH} levels of parentheses")
        self.expect("(")
        match self.peek():
            case "&":
                self.at += 1
                found: Filter = And(self.several(depth))
            case "|":
                self.at += 1
                found = Or(self.several(depth))
            case "!":
                self.at += 1
                found = Not(self.filter(depth + 1))
            case "(":
                found = self.filter(depth + 1)
            case ")":
                found = And(())
            case _:
                found = self.comparison()
        self.expect(")")
        return found

    def several(self, depth: int) -> tuple[Filter, ...]:
        parts = []
        while self.peek() == "(":
            parts.append(self.filter(depth + 1))
        return tuple(parts)

    def comparison(self) -> Filter:
        head = _COMPARISON.match(self.text, self.at)
        if head is None:
            raise ConstraintError(f"a comparison is expected at {self.where()}")
        end = self.text.find(")", head.end())
        if end < 0:
            raise ConstraintError(f"')' is missing after {self.where()}")
        self.at = end
        return Compare(head[1], head[2], self.text[head.end() : end].strip())


def _look_up(properties: Properties, name: str) -> Any:
    """The property's value; a type written in the filter or in the property is no part of it."""
    if name in properties:
        return properties[name]
    bare = _TYPE_SUFFIX.sub("", name)
    for key in (bare, f"{bare}@v", f"{bare}@d"):
        if key in properties:
            return properties[key]
    return None


def _compare(actual: Any, op: str, wanted: str, *, versions: bool = False) -> bool:
    if op == "!=":
        return not _compare(actual, "=", wanted, versions=versions)
    if isinstance(actual, bool):
        return op == "=" and wanted.lower() == json.dumps(actual)
    if isinstance(actual, int | float):
        left, right = _number(str(actual)), _number(wanted)
        return right is not None and left is not None and _ordered(left, op, right)
    text = str(actual)
    if versions:
        return _ordered(_version(text), op, _version(wanted))
    if op == "=":
        return _wildcard(wanted).fullmatch(text) is not None
    for convert in (_number, _date):
        left_typed, right_typed = convert(text), convert(wanted)
        if left_typed is not None and right_typed is not None:
            return _ordered(left_typed, op, right_typed)
    return _ordered(text, op, wanted)


def _ordered(left: Any, op: str, right: Any) -> bool:
    match op:
        case "=":
            return bool(left == right)
        case "<":
            return bool(left < right)
        case "<=":
            return bool(left <= right)
        case ">":
            return bool(left > right)
        case _:
            return bool(left >= right)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _date(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.astimezone()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _wildcard(value: str) -> re.Pattern[str]:
    pieces = [re.escape(_unescape(piece)) for piece in value.split("*")]
    return re.compile(".*".join(pieces), re.DOTALL)


def _unescape(text: str) -> str:
    """RFC 4515's ``\\28`` for a byte that would otherwise mean something."""
    return re.sub(r"\\([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)
