"""The FairOS-DFS server's vocabulary: its error texts, its path arithmetic, its way with sizes.

Imports nothing of ours. Texts and path rules are the real server's (commit bf04d9eb) and were
compared with it running; clients match on the texts, so do not improve them. Paths are keys taken
literally: ``/a`` and ``/a/`` are different objects here, as they are there.
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import unquote

NOT_LOGGED_IN = "user not logged-in"
POD_NOT_OPEN = "pod not open"
POD_NOT_FOUND = "pod does not exist"
POD_EXISTS = "pod already exists"
POD_NAME_TOO_LONG = "pod name too long"
MAX_PODS = "max number of pods reached"
DIR_NOT_PRESENT = "directory not present"
DIR_EXISTS = "directory name already present"
FILE_NOT_FOUND = "file not found in dfs"
READ_ONLY_POD = "operation not permitted: read only pod"
READ_ONLY_FEED = "read only feed"
BAD_REFERENCE = "invalid reference:"

INDEX_NAME = "index.dfs"
POD_NAME_MAX = 64
PODS_MAX = 65_535
DIR_NAME_MAX = 100
PASSWORD_MIN = 12
BLOCK_MIN, BLOCK_MAX = 1_000_000, 8_000_000
MODE_FILE, MODE_DIR = 0o100600, 0o040700
S_IFREG, S_IFDIR = 0o100000, 0o040000

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power}
    _UNITS |= {f"{_letter}i": 1024**_power, f"{_letter}ib": 1024**_power}

_PARAMETER = re.compile(r';\s*([^\s=;]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]*))')
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SPECIAL = re.compile(r'\\([()<>@,;:\\"/\[\]?=])')


class Refusal(Exception):
    """The server declines; ``str()`` is its text, the route decides on the status."""


class Panic(Exception):
    """The real server dereferences nil here: the connection ends without an answer."""


def join(path: str, name: str) -> str:
    """The key of ``name`` in directory ``path``; ``/`` and the empty path are the root."""
    if path in ("/", ""):
        return "/" + name.removeprefix("/")
    if not name:
        return path
    return f"/{path.removeprefix('/')}/{name.removeprefix('/')}"


def dir_key(path: str) -> str:
    """The key under which a directory called ``path`` is looked up."""
    return "/" if path in ("/", "") else "/" + path.removeprefix("/")


def parent_of(path: str) -> str:
    """Everything before the last slash, cleaned: ``.`` when there is no slash."""
    head = path[: path.rfind("/") + 1]
    if not head:
        return "."
    cleaned = posixpath.normpath(head)
    return "/" + cleaned.lstrip("/") if head.startswith("/") else cleaned


def base_of(path: str) -> str:
    """The last component; ``.`` of an empty path, ``/`` of one that is all slashes."""
    if not path:
        return "."
    return path.rstrip("/").rpartition("/")[2] or "/"


def parse_size(text: str) -> int:
    """Bytes in ``1Mb``, ``2 MiB`` or ``4000000``. Raises Refusal with the server's text."""
    match = re.match(r"[0-9.,]*", text)
    digits = match.group() if match else ""
    try:
        number = float(digits.replace(",", ""))
    except ValueError:
        raise Refusal(f'strconv.ParseFloat: parsing "{digits}": invalid syntax') from None
    unit = text[len(digits) :].strip().lower()
    if unit not in _UNITS:
        raise Refusal(f"unhandled size name: {unit}")
    return int(number * _UNITS[unit]) & 0xFFFFFFFF


def chunks_of_upload(size: int, block_size: int) -> int:
    """How many chunks an upload makes: the trees of its blocks and of the list of its blocks.

    Without compression. Chunks hold 4096 bytes or, encrypted, the references of 64 others.
    """
    blocks = [min(block_size, size - start) for start in range(0, size, block_size)]
    # An entry of the list is a block's size, its compressed size and its reference as JSON.
    return sum(map(_chunks_of_tree, [*blocks, 13 + 130 * len(blocks)]))


def _chunks_of_tree(size: int) -> int:
    level = max(1, -(-size // 4096))
    count = level
    while level > 1:
        level = -(-level // 64)
        count += level
    return count


def parse_mode(text: str) -> int:
    """A mode in decimal digits, 32 bits. Raises Refusal with the server's text."""
    if not re.fullmatch(r"[0-9]+", text):
        raise Refusal(f'strconv.ParseUint: parsing "{text}": invalid syntax')
    if int(text) > 0xFFFFFFFF:
        raise Refusal(f'strconv.ParseUint: parsing "{text}": value out of range')
    return int(text)


def disposition(header: str) -> dict[str, str]:
    """The parameters of a Content-Disposition header as Go reads them.

    A backslash escapes only special characters, percent signs are literal except in ``name*=``.
    Raises ValueError when there are control characters in the header.
    """
    if _CONTROL.search(header):
        raise ValueError("malformed MIME header line")
    found: dict[str, str] = {}
    for key, quoted, token in _PARAMETER.findall(header):
        value = _ESCAPED_SPECIAL.sub(r"\1", quoted) if quoted else token
        if key.endswith("*") and value.count("'") >= 2:
            value = unquote(value.split("'", 2)[2], errors="replace")
        found[key.rstrip("*").lower()] = printable(value)
    return found


def printable(text: str) -> str:
    """``text`` as it comes back from the server's JSON: what is not UTF-8 becomes U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"%PDF-", "application/pdf"),
    (b"\x1f\x8b\x08", "application/x-gzip"),
    (b"PK\x03\x04", "application/zip"),
)
_BINARY = bytes([*range(9), 11, *range(14, 27), *range(28, 32)])


def sniff(head: bytes) -> str:
    """The content type that the server guesses from the first 512 bytes."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    start = head.lstrip(b"\t\n\x0c\r ").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "text/html; charset=utf-8"
    if start.startswith(b"<?xml"):
        return "text/xml; charset=utf-8"
    if head.translate(None, _BINARY) == head:
        return "text/plain; charset=utf-8"
    return "application/octet-stream"
