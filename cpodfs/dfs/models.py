"""What the FairOS-DFS server says, as frozen values: parsed strictly, or refused as BadReply.

Imports only errors, ``_members`` and pydantic. The server is not trusted: sizes and times come as
decimal strings and are bounded here, but names are only known to be text — the caller decides which
names ("..", "a/b", NUL) it will show to the kernel. What can be long, a listing and the list of pods,
is parsed as it arrives, and an entry that is malformed is left out of it.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cpodfs.dfs._members import Members
from cpodfs.errors import BadReply

_MAX = 2**63 - 1
_MODE_BITS = 0o7777
_FILE_MODE = 0o600
_DIR_MODE = 0o700
_MAX_MODE = 2**32
_BATCH = 256

MAX_LISTING = 96 * 2**20
"""Bytes of memory that one listing may take: two million entries with names of ordinary length."""
MAX_PODS = 65_535
"""How many pods a user can have, says the server; and as many received ones."""
MAX_BODY = {"/v1/dir/ls": 512 * 2**20, "/v1/pod/ls": 32 * 2**20}
"""Bytes of a reply that is parsed as it arrives."""
MAX_MALFORMED = 10_000
"""More are not some malformed entries, but no listing."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One child of a directory. Sizes in bytes (0 for directories), times in Unix seconds."""

    name: str
    is_dir: bool
    size: int
    mode: int
    mtime_s: int
    atime_s: int
    ctime_s: int


class Listing:
    """A directory's children, files first, each kind in the server's order; to be iterated.

    Kept packed, at about 30 bytes and the name each, until looked at. A name can occur twice.
    ``malformed``: how many entries were left out because they could not be understood.
    """

    def __init__(self) -> None:
        self._batches: dict[bool, list[bytes]] = {False: [], True: []}
        self._count = 0
        self.malformed = 0

    def __iter__(self) -> Iterator[Entry]:
        for batches in self._batches.values():
            for batch in batches:
                for row in marshal.loads(batch):  # noqa: S302 - written below
                    yield Entry(*row)

    def __len__(self) -> int:
        return self._count

    def add(self, rows: list[tuple[Any, ...]], *, are_dirs: bool) -> int:
        """Entries as tuples of their fields, all of one kind; returns the bytes that they take."""
        batch = marshal.dumps(rows)
        self._batches[are_dirs].append(batch)
        self._count += len(rows)
        return len(batch)


@dataclass(frozen=True, slots=True)
class PodList:
    """``malformed``: how many names were left out because they are none."""

    own: tuple[str, ...]
    shared: tuple[str, ...]
    malformed: int = 0


@dataclass(frozen=True, slots=True)
class FileStat:
    name: str
    path: str
    size: int
    block_size: int
    mode: int
    mtime_s: int
    atime_s: int
    ctime_s: int
    content_type: str
    compression: str


@dataclass(frozen=True, slots=True)
class FileStatus:
    """Chunks of an upload: all, those that are on their way, those that Swarm has.

    A server over a Bee node of version 2 tells ``total`` and ``processed`` as 0, and the truth of
    ``synced`` only.
    """

    total: int
    processed: int
    synced: int


@dataclass(frozen=True, slots=True)
class DirStat:
    name: str
    path: str
    mode: int
    mtime_s: int
    atime_s: int
    ctime_s: int
    dirs: int
    files: int


@dataclass(frozen=True, slots=True)
class PodStat:
    name: str
    address: str


@dataclass(frozen=True, slots=True, repr=False)
class ShareInfo:
    """What a pod's sharing reference leads to. ``password`` reads the pod: never show it."""

    pod: str
    address: str
    password: str
    owner_address: str

    def __repr__(self) -> str:
        return f"ShareInfo(pod={self.pod!r}, address={self.address!r})"


@dataclass(frozen=True, slots=True)
class FileShareInfo:
    """A file offered by another user: its name, its size in bytes, and who sent it."""

    name: str
    size: int
    sender: str


@dataclass(frozen=True, slots=True, repr=False)
class Account:
    """A user as signed up. ``mnemonic`` is the key to the account, empty if the caller gave it."""

    user: str
    address: str
    name_hash: str
    public_key: str
    mnemonic: str

    def __repr__(self) -> str:
        return f"Account(user={self.user!r}, address={self.address!r})"


def _decimal(value: object) -> object:
    """Take "123" or 123; anything else is left for the strict validator to refuse."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 19:
        return int(value)
    return value


_Count = Annotated[int, BeforeValidator(_decimal), Field(ge=0, le=_MAX)]
_Mode = Annotated[int, Field(ge=0, le=2**32)]


class _In(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Times(_In):
    mode: _Mode | None = None
    creation: _Count = Field(0, alias="creationTime")
    modification: _Count = Field(0, alias="modificationTime")
    access: _Count = Field(0, alias="accessTime")


class _FileStatIn(_Times):
    name: str = Field(alias="fileName")
    path: str = Field("", alias="filePath")
    size: _Count = Field(alias="fileSize")
    block_size: _Count = Field(0, alias="blockSize")
    content_type: str = Field("", alias="contentType")
    compression: str = ""


class _FileStatusIn(_In):
    total: _Count
    processed: _Count
    synced: _Count


class _DirStatIn(_Times):
    name: str = Field(alias="dirName")
    path: str = Field("", alias="dirPath")
    dirs: _Count = Field(0, alias="noOfDirectories")
    files: _Count = Field(0, alias="noOfFiles")


class _PodStatIn(_In):
    name: str = Field(alias="podName")
    address: str = Field("", alias="podAddress")
    plain_address: str = Field("", alias="address")


class _ShareInfoIn(_In):
    pod: str = Field(alias="podName")
    address: str = Field("", alias="podAddress")
    password: str = ""
    owner: str = Field("", alias="userAddress")


class _FileShareIn(_In):
    name: str = Field(alias="name")
    size: _Count = Field(0, alias="size")
    sender: str = Field("", alias="sourceAddress")


class _AccountIn(_In):
    address: str
    name_hash: str = Field("", alias="nameHash")
    public_key: str = Field("", alias="publicKey")
    mnemonic: str = ""
    token: str = Field("", alias="accessToken")


class _UploadIn(_In):
    class One(_In):
        name: str = Field("", alias="fileName")
        message: str = ""

    responses: list[One] = Field(alias="Responses")


class _PresentIn(_In):
    present: bool


class _PodReferenceIn(_In):
    reference: str = Field(alias="podSharingReference", min_length=1)


class _FileReferenceIn(_In):
    reference: str = Field(alias="fileSharingReference", min_length=1)


class _ReceivedIn(_In):
    file_name: str = Field(alias="fileName", min_length=1)


_Model = TypeVar("_Model", bound=_In)


def _parse(model: type[_Model], body: bytes, endpoint: str) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as exc:
        # Only the place and kind of the fault: the input may hold a token or a mnemonic.
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadReply(
            f"reply is not as agreed: {where}: {first['type']}", endpoint=endpoint
        ) from None


def _permissions(mode: int | None, default: int) -> int:
    return default if mode is None else mode & _MODE_BITS


def file_status(body: bytes, endpoint: str) -> FileStatus:
    parsed = _parse(_FileStatusIn, body, endpoint)
    return FileStatus(parsed.total, parsed.processed, parsed.synced)


_Parsed_co = TypeVar("_Parsed_co", covariant=True)


class Parser(Protocol[_Parsed_co]):
    """Takes a reply as it arrives. Both methods raise BadReply."""

    def feed(self, data: bytes) -> None: ...

    def end(self) -> _Parsed_co: ...


class _MembersParser:
    def __init__(self, arrays: tuple[str, ...], endpoint: str) -> None:
        self._endpoint = endpoint
        self._left = MAX_BODY[endpoint]
        self._members = Members(arrays, self._take)
        self._malformed = 0

    def feed(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise self._bad(f"larger than {MAX_BODY[self._endpoint] >> 20} MiB")
        try:
            self._members.feed(data)
        except ValueError as exc:
            raise self._bad(str(exc)) from None

    def _end(self) -> None:
        try:
            self._members.end()
        except ValueError as exc:
            raise self._bad(str(exc)) from None

    def _take(self, name: str, item: Any) -> None:
        raise NotImplementedError

    def _leave_out(self) -> None:
        self._malformed += 1
        if self._malformed > MAX_MALFORMED:
            raise self._bad(f"more than {MAX_MALFORMED:,} entries are malformed")

    def _bad(self, how: str) -> BadReply:
        return BadReply(f"reply is not as agreed: {how}", endpoint=self._endpoint)


class ListingParser(_MembersParser):
    """The reply of ``dir/ls``. BadReply also for one that would take more than ``MAX_LISTING``."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(("dirs", "files"), endpoint)
        self._listing = Listing()
        self._rows: dict[str, list[tuple[Any, ...]]] = {"dirs": [], "files": []}
        self._bytes = 0

    def end(self) -> Listing:
        self._end()
        for name in self._rows:
            self._pack(name)
        self._listing.malformed = self._malformed
        return self._listing

    def _take(self, name: str, item: Any) -> None:
        row = _entry(item, is_dir=name == "dirs")
        if row is None:
            self._leave_out()
            return
        rows = self._rows[name]
        rows.append(row)
        if len(rows) == _BATCH:
            self._pack(name)

    def _pack(self, name: str) -> None:
        self._bytes += self._listing.add(self._rows[name], are_dirs=name == "dirs")
        self._rows[name] = []
        if self._bytes > MAX_LISTING:
            raise BadReply(
                f"the directory is too large: its first {len(self._listing):,} entries take "
                f"{MAX_LISTING >> 20} MiB, more than one directory may; divide it",
                endpoint=self._endpoint,
            )


def _entry(item: Any, *, is_dir: bool) -> tuple[Any, ...] | None:
    """The fields of an ``Entry``; None for what is none. By hand: there can be millions."""
    if type(item) is not dict or type(name := item.get("name")) is not str:
        return None
    size = _number(item.get("size"))
    mode = item.get("mode")
    times = [_number(item.get(f"{what}Time")) for what in ("modification", "access", "creation")]
    if size is None or None in times or not (mode is None or _is_mode(mode)):
        return None
    permissions = _permissions(mode, _DIR_MODE if is_dir else _FILE_MODE)
    return (name, is_dir, 0 if is_dir else size, permissions, *times)


def _number(value: Any) -> int | None:
    """A count as the server writes it, or 0 for one that it left out."""
    if value is None:
        return 0
    number = _decimal(value)
    return number if type(number) is int and 0 <= number <= _MAX else None


def _is_mode(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_MODE


class PodListParser(_MembersParser):
    """The reply of ``pod/ls``. BadReply also for more than ``MAX_PODS`` of one kind."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(("pods", "sharedPods"), endpoint)
        self._names: dict[str, dict[str, None]] = {"pods": {}, "sharedPods": {}}

    def end(self) -> PodList:
        self._end()
        if "pods" not in self._members.found:
            raise self._bad("there are no pods in it")
        own, shared = map(tuple, self._names.values())
        return PodList(own, shared, self._malformed)

    def _take(self, name: str, item: Any) -> None:
        if type(item) is not str:
            self._leave_out()
            return
        names = self._names[name]
        names[item] = None
        if len(names) > MAX_PODS:
            raise self._bad(f"more than {MAX_PODS:,} pods")


def file_stat(body: bytes, endpoint: str) -> FileStat:
    raw = _parse(_FileStatIn, body, endpoint)
    return FileStat(
        name=raw.name,
        path=raw.path,
        size=raw.size,
        block_size=raw.block_size,
        mode=_permissions(raw.mode, _FILE_MODE),
        mtime_s=raw.modification,
        atime_s=raw.access,
        ctime_s=raw.creation,
        content_type=raw.content_type,
        compression=raw.compression,
    )


def dir_stat(body: bytes, endpoint: str) -> DirStat:
    raw = _parse(_DirStatIn, body, endpoint)
    return DirStat(
        name=raw.name,
        path=raw.path,
        mode=_permissions(raw.mode, _DIR_MODE),
        mtime_s=raw.modification,
        atime_s=raw.access,
        ctime_s=raw.creation,
        dirs=raw.dirs,
        files=raw.files,
    )


def pod_stat(body: bytes, endpoint: str) -> PodStat:
    raw = _parse(_PodStatIn, body, endpoint)
    return PodStat(name=raw.name, address=raw.address or raw.plain_address)


def share_info(body: bytes, endpoint: str) -> ShareInfo:
    raw = _parse(_ShareInfoIn, body, endpoint)
    return ShareInfo(raw.pod, raw.address, raw.password, raw.owner)


def file_share_info(body: bytes, endpoint: str) -> FileShareInfo:
    raw = _parse(_FileShareIn, body, endpoint)
    return FileShareInfo(raw.name, raw.size, raw.sender)


def account(body: bytes, endpoint: str, *, user: str) -> Account:
    raw = _parse(_AccountIn, body, endpoint)
    return Account(user, raw.address, raw.name_hash, raw.public_key, raw.mnemonic)


def access_token(body: bytes, endpoint: str) -> str:
    token = _parse(_AccountIn, body, endpoint).token
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise BadReply("no usable accessToken in the reply", endpoint=endpoint)
    return token


def upload_failure(body: bytes, endpoint: str) -> str | None:
    """The server's complaint about the one file of an upload, or None when it was stored."""
    responses = _parse(_UploadIn, body, endpoint).responses
    if len(responses) != 1:
        raise BadReply(f"{len(responses)} responses to an upload of one file", endpoint=endpoint)
    message = responses[0].message
    return None if message == "uploaded successfully" else message or "no message"


def present(body: bytes, endpoint: str) -> bool:
    return _parse(_PresentIn, body, endpoint).present


def pod_reference(body: bytes, endpoint: str) -> str:
    return _parse(_PodReferenceIn, body, endpoint).reference


def file_reference(body: bytes, endpoint: str) -> str:
    return _parse(_FileReferenceIn, body, endpoint).reference


def received_name(body: bytes, endpoint: str) -> str:
    return _parse(_ReceivedIn, body, endpoint).file_name


def error_message(body: bytes) -> str | None:
    """The text of an error reply; None when it is not JSON as this server would send it."""
    try:
        raw: Any = _ErrorIn.model_validate_json(body)
    except ValidationError:
        return None
    return str(raw.message)


class _ErrorIn(_In):
    message: str
