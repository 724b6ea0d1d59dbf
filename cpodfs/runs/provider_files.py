"""Files of a provider run: the archive that goes out, and the archives that come back.

Imports `paths`, and `mirror` for folders without links. What comes back was written by a stranger's
machine: an archive is read member by member, and only regular files and directories below the output
folder, within limits, reach the pod. An archive with anything else is refused whole; an honest entry
that a pod cannot hold is left out and reported, for the rest has been paid for. The mount may go and
come back: every call starts from the pod's path, and blocks, so call it from a thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from cpodfs.errors import NameRefused
from cpodfs.paths import check_dir_name, check_file_name, decode_name
from cpodfs.runs.mirror import make_folder

MAX_BYTES = 64 << 30
"""Of all files that a run returns, together, each at its largest; more is refused."""
MAX_FILES = 100_000
"""In one archive."""
AWAY = frozenset(
    {
        *(errno.ENOTCONN, errno.EIO, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.ESTALE),
        *(errno.ENOENT, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENOSPC, errno.EDQUOT),
        *(errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)
"""What a mount says that is away, or full, for a while."""
_ENTRYS_OWN = frozenset(
    {
        *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EFBIG),
        *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.EOPNOTSUPP),
        *(errno.EACCES, errno.EPERM),
    }
)
"""What it says of one entry that it cannot hold: others may do well."""
_CHUNK_BYTES = 1 << 20
_LONG_NAME_BYTES = 4096
_DEPTH_LIMIT = 64
_SHOWN_CHARS = 1000


class BadArchive(Exception):
    """What came back is not what it should be; says which entry, in one line."""


class _CannotHold(Exception):
    """The pod cannot hold an entry; ``name`` is that, or the folder that keeps it out."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


class NotThere(Exception):
    """A file that was deleted since the run began."""


@dataclass(frozen=True)
class Packed:
    """An archive on disk: its hash as hex digits, its size in bytes."""

    path: Path
    sha256: str
    size: int


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_in(pod: Path, name: str) -> str:
    """The hash of a file in the pod. Raises NotThere if the pod is there and the file is not."""
    try:
        return sha256_of(pod / name)
    except FileNotFoundError:
        if pod.is_dir():
            raise NotThere(name) from None
        raise


def pack(pod: Path, names: Iterable[str], target: Path, leave_out: frozenset[str]) -> Packed:
    """One tar archive of the folders ``names`` of the pod, without the files in ``leave_out``.

    Names are relative to the pod. Folders that are missing are left out, links are kept as links
    (they lead nowhere but inside the machine that they are sent to), devices and sockets are not
    sent. Raises OSError; ELOOP for a folder that a link leads to: what it leads to is not the pod's.
    """

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if member.name in leave_out or not (member.isreg() or member.isdir() or member.issym()):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    # Hard links are what tarfile makes of a file seen twice; a FUSE pod has none.
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in sorted(set(names)):
            if (link := _link_on_the_way(pod, name)) is not None:
                raise OSError(errno.ELOOP, "a link, which is not followed", link)
            if (pod / name).is_dir():
                archive.add(pod / name, arcname=name, filter=wanted)
    return Packed(target, sha256_of(target), target.stat().st_size)


def matching(pod: Path, pattern: str) -> list[str]:
    """The regular files that a glob of the recipe matches, sorted, relative to the pod."""
    found = []
    for path in pod.glob(pattern):
        name = path.relative_to(pod).as_posix()
        if stat.S_ISREG(path.lstat().st_mode) and _link_on_the_way(pod, name) is None:
            found.append(name)
    return sorted(found)


def _link_on_the_way(pod: Path, name: str) -> str | None:
    """The first part of a path in the pod that is a link, as a path in the pod. A program that ran
    in a sandbox may have put it there for us, who are in none."""
    parts = PurePosixPath(name).parts
    paths = (PurePosixPath(*parts[:depth]) for depth in range(1, len(parts) + 1))
    return next((str(path) for path in paths if (pod / path).is_symlink()), None)


_DEAR_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_SPARSE}
)


class _Member(tarfile.TarInfo):
    """An entry that is not read when its header alone is dear: `tarfile` takes minutes over some."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _DEAR_TYPES:
            raise BadArchive("pax headers or sparse files, which our script does not make")
        long = self.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if long and self.size > _LONG_NAME_BYTES:
            raise BadArchive(f"a name of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


class Unpacker:
    """Brings archives of results into the pod's output folder. Not for two threads at once.

    ``root``: the pod. ``output``: the folder that everything must lie in, relative to the pod.
    """

    def __init__(self, root: Path, output: str, max_bytes: int = MAX_BYTES) -> None:
        self._root = root
        self._output = output.split("/")
        self._left = max_bytes
        self._counted: dict[str, int] = {}

    def unpack(self, archive: Path) -> dict[str, str]:
        """Write what is new or changed; what the pod cannot hold is returned: name, why.

        The names are quoted, and safe to show. A file that has only grown is only appended to, one
        that is the same is not touched. Raises BadArchive, before which earlier entries were
        written, and OSError from the mount; after one of `AWAY` it may be called again.
        """
        missing: dict[str, str] = {}
        try:
            with tarfile.open(archive, "r:", tarinfo=_Member) as members:
                for count, member in enumerate(members, 1):
                    if count > MAX_FILES:
                        raise BadArchive(f"more than {MAX_FILES} files in one archive")
                    try:
                        self._take(members, member)
                    except _CannotHold as error:
                        missing.setdefault(repr(error.name[:_SHOWN_CHARS]), str(error))
        except (tarfile.TarError, ValueError, EOFError, RecursionError, LookupError) as error:
            raise BadArchive(f"not a tar archive: {error}") from None
        return missing

    def _take(self, members: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = self._parts(member)
        if not member.isdir() and len(parts) <= len(self._output):
            raise BadArchive(f"{member.name!a}: a file in place of the output folder")
        _check_names(parts, member.isdir())
        self._count(parts, member.size)
        try:
            folder = make_folder(str(self._root), parts if member.isdir() else parts[:-1])
            try:
                if not member.isdir():
                    source = members.extractfile(member)
                    assert source is not None
                    mode = 0o755 if member.mode & 0o100 else 0o644
                    _write_differences(source, folder, parts[-1], mode)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in _ENTRYS_OWN:
                raise
            why = error.strerror or type(error).__name__
            raise _CannotHold("/".join(parts), f"the pod says: {why}") from None

    def _parts(self, member: tarfile.TarInfo) -> list[str]:
        name = member.name
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise BadArchive(f"{name!a}: not a regular file or a directory")
        parts = list(PurePosixPath(name).parts)
        if name.startswith("/") or ".." in parts or not parts:
            raise BadArchive(f"{name!a}: an absolute name, or one with '..'")
        if parts[: len(self._output)] != self._output:
            raise BadArchive(f"{name!a}: not in the output folder")
        return parts

    def _count(self, parts: list[str], size: int) -> None:
        # A file that grows comes again and again, and so may all of an archive.
        key = "/".join(parts)
        counted = self._counted.get(key, 0)
        self._left -= max(0, size - counted)
        self._counted[key] = max(counted, size)
        if self._left < 0:
            raise BadArchive("the results are larger than a run may return")


def _check_names(parts: list[str], is_dir: bool) -> None:
    """Raise _CannotHold for what the mount would refuse: it says only EINVAL, we can say why."""
    for depth, part in enumerate(parts, 1):
        inner = is_dir or depth < len(parts)
        name = "/".join(parts[:depth]) + ("/" if inner else "")
        if depth > _DEPTH_LIMIT:
            raise _CannotHold(name, f"deeper than {_DEPTH_LIMIT} folders")
        raw = os.fsencode(part)
        try:
            (check_dir_name if inner else check_file_name)(decode_name(raw))
        except NameRefused as error:
            why = str(error).removeprefix(f"{raw!r}: ").removeprefix(f"{part!r}: ")
            raise _CannotHold(name, why) from None


def _write_differences(source: IO[bytes], folder: int, name: str, mode: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    target = os.open(name, flags, mode, dir_fd=folder)
    try:
        status = os.fstat(target)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EEXIST, "something that is no regular file is in its place")
        offset, same = 0, True
        while chunk := source.read(_CHUNK_BYTES):
            same = same and _agrees(target, offset, chunk, status.st_size)
            if not same:
                _write_at(target, chunk, offset)
            offset += len(chunk)
        if status.st_size > offset:
            os.ftruncate(target, offset)
        if status.st_size == 0 and mode != stat.S_IMODE(status.st_mode) and mode == 0o755:
            os.fchmod(target, mode)
    finally:
        os.close(target)


def _agrees(target: int, offset: int, chunk: bytes, size: int) -> bool:
    if offset + len(chunk) <= size:
        return os.pread(target, len(chunk), offset) == chunk
    return False


def _write_at(target: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


class TaskLog:
    """``tasks/<n>.log`` of one task, appended to as its output comes."""

    def __init__(self, pod: Path, log: str, number: int) -> None:
        self._root = str(pod)
        self._parts = [*log.split("/"), "tasks"]
        self._name = f"{number}.log"

    def append(self, data: bytes) -> None:
        """Raises OSError from the mount."""
        folder = make_folder(self._root, self._parts)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(self._name, flags, 0o644, dir_fd=folder)
        finally:
            os.close(folder)
        with open(handle, "ab") as file:
            file.write(data)
