"""Names and paths: what a name may be here, at the server, and in the kernel.

A leaf module (imports only errors). Names are ``str`` inside and bytes at the kernel's edge. Limits
are FairOS-DFS's (``shared/fairos-dfs-api.md``): pods 1–64 bytes, trimmed by the server; directories
at most 100 bytes; ``index.dfs`` is the server's own directory file and destroys a directory when
uploaded. Names that come from a server are hostile until ``is_safe_remote_name`` has said otherwise.
"""

from __future__ import annotations

from cpodfs.errors import NameRefused, NameTooLong

RUN_NAME = ".run"
"""The control file in a pod's root; never stored in the pod."""

INDEX_NAME = "index.dfs"
POD_NAME_MAX = 64
DIR_NAME_MAX = 100
FILE_NAME_MAX = 255
OUR_PREFIX = ".cpodfs-"
TEMP_PREFIX = f"{OUR_PREFIX}moving-"
"""Remote name of an object that is on its way from one name to another in a cycle of renames."""


def decode_name(raw: bytes) -> str:
    """The name that the kernel gave. Raises NameRefused for what JSON could not carry."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise NameRefused(f"{raw!r}: not UTF-8; FairOS-DFS cannot store this name") from None


def check_file_name(name: str) -> None:
    """Raise NameRefused or NameTooLong unless a file may be called ``name`` in a pod."""
    _check(name, FILE_NAME_MAX)
    if name == INDEX_NAME:
        raise NameRefused(f"{name!r}: reserved, FairOS-DFS keeps its directories in files so named")


def check_dir_name(name: str) -> None:
    """Raise NameRefused or NameTooLong unless a directory may be called ``name`` in a pod."""
    _check(name, DIR_NAME_MAX)
    if name.startswith(OUR_PREFIX):
        raise NameRefused(f"{name!r}: names that begin with {OUR_PREFIX!r} are cpodfs's own")
    if name == INDEX_NAME:
        raise NameRefused(f"{name!r}: reserved, FairOS-DFS keeps its directories in files so named")


def check_pod_name(name: str) -> None:
    """Raise NameRefused or NameTooLong unless a pod may be called ``name``."""
    _check(name, POD_NAME_MAX)
    if name != name.strip():
        raise NameRefused(f"{name!r}: FairOS-DFS trims white space around pod names")
    if name == RUN_NAME or name.startswith(".Trash"):
        raise NameRefused(f"{name!r}: not a name for a pod")


def is_safe_remote_name(name: str) -> bool:
    """Whether a name from the server may appear in the mount.

    What may not: anything that is not exactly one path component, or that we could not tell from
    the server's or our own files. Such objects stay in the pod, unseen.
    """
    if name in ("", ".", "..", INDEX_NAME) or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode("utf-8")) <= FILE_NAME_MAX
    except UnicodeEncodeError:
        return False


def join(parts: list[str]) -> str:
    """The absolute path inside a pod of the components ``parts``; ``/`` for none."""
    return "/" + "/".join(parts)


def _check(name: str, limit: int) -> None:
    if len(name.encode("utf-8")) > limit:
        raise NameTooLong(f"{name!r}: longer than the {limit} bytes that FairOS-DFS takes")
    if name in ("", ".", "..") or "/" in name:
        raise NameRefused(f"{name!r}: not a name")
    bad = next((c for c in name if ord(c) < 0x20 or ord(c) == 0x7F), None)
    if bad is not None:
        raise NameRefused(f"{name!r}: control characters do not survive FairOS-DFS")
