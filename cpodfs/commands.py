"""What the words of a recipe's command are to the program that gets them: data, or program text.

A leaf: standard library only. ``foreach`` puts a file's name in the place of ``{}``. As a word of its own,
or as a part of a plain one, that is data. Inside a program's text the name, which strangers can choose,
would be a piece of that program; quotes around it do not help, as a name may have quotes, too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

PLACE = "{}"

_PLAIN = re.compile(r"[\w@%+=:,./{}-]*")
"""No word of a shell's or another language's that does more than to name something."""


@dataclass(frozen=True)
class _Interpreter:
    """``text``: the options with which the next word that is no option is program text, or they
    themselves from there on; ``values``: options that have a value in a word of its own; ``first``: the
    first word that is no option is program text even without."""

    names: str
    text: str
    values: frozenset[str] = frozenset()
    first: bool = False


_INTERPRETERS = (
    _Interpreter(
        "(ba|da|a|z|k|mk|c|tc|fi)?sh",
        "-[A-Za-z]*c.*|--command(=.*)?",
        frozenset(("-o", "+o", "-O", "+O", "--rcfile", "--init-file")),
    ),
    _Interpreter(r"(python|pypy)[\d.]*", "-[A-Za-z]*c.*", frozenset(("-W", "-X"))),
    _Interpreter("perl|ruby", "-[A-Za-z0-9]*[eE].*", frozenset(("-I", "-r"))),
    _Interpreter("node|nodejs|deno|bun", "-p?e.*|-p.*|--(eval|print)(=.*)?", frozenset(("-r",))),
    _Interpreter("julia|lua[0-9.]*|Rscript|R|ghc", "-[eE].*|--eval(=.*)?|--print(=.*)?"),
    _Interpreter("php", "-[rRBE].*", frozenset(("-d", "-c"))),
    _Interpreter("[gmn]?awk", "-e.*|--source(=.*)?", frozenset(("-F", "-v", "-f")), first=True),
    _Interpreter("g?sed", "-[A-Za-z]*e.*|--expression(=.*)?", frozenset(("-f",)), first=True),
)


def unsafe_place(argv: Sequence[str]) -> str | None:
    """The word of a command in which a file's name would be taken for program text, if there is one:
    one with ``{}`` in it or, where none has that, the last, which the name replaces."""
    texts = _program_texts(argv)
    for at, word in enumerate(argv):
        if PLACE in word and (at in texts or (word != PLACE and not _PLAIN.fullmatch(word))):
            return word
    if len(argv) - 1 in texts and not any(PLACE in word for word in argv):
        return argv[-1]
    return None


def _program_texts(argv: Sequence[str]) -> set[int]:
    """The places of the words that hold program text. Any word may name an interpreter: others start
    programs, too (``env``, ``timeout``, ``find -exec``)."""
    found: set[int] = set()
    for at, word in enumerate(argv):
        for interpreter in _INTERPRETERS:
            if re.fullmatch(interpreter.names, posixpath.basename(word)):
                found |= _texts_of(interpreter, argv, at + 1)
    return found


def _texts_of(interpreter: _Interpreter, argv: Sequence[str], at: int) -> set[int]:
    found: set[int] = set()
    is_next = interpreter.first
    while at < len(argv):
        word = argv[at]
        if word in interpreter.values:
            at += 1
        elif re.fullmatch(interpreter.text, word, re.DOTALL):
            found.add(at)
            is_next = True
        elif word[:1] not in ("-", "+") or word == "-":
            return found | {at} if is_next else found
        at += 1
    return found
