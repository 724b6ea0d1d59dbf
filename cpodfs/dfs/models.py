"""What the FairOS-DFS server says, as frozen values: parsed strictly, or refused as BadReply.

Imports only errors and pydantic. The server is not trusted: sizes and times come as decimal
strings and are bounded here, but names are only known to be text — the caller decides which
names ("..", "a/b", NUL) it will show to the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cpodfs.errors import BadReply

_MAX = 2**63 - 1
_MODE_BITS = 0o7777
_FILE_MODE = 0o600
_DIR_MODE = 0o700


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


@dataclass(frozen=True, slots=True)
class Listing:
    """A directory's children in the server's order; a name occurs once (the last one wins)."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class PodList:
    own: tuple[str, ...]
    shared: tuple[str, ...]


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


class _EntryIn(_Times):
    name: str
    size: _Count | None = None

    def entry(self, *, is_dir: bool) -> Entry:
        default = _DIR_MODE if is_dir else _FILE_MODE
        return Entry(
            name=self.name,
            is_dir=is_dir,
            size=0 if is_dir else self.size or 0,
            mode=_permissions(self.mode, default),
            mtime_s=self.modification,
            atime_s=self.access,
            ctime_s=self.creation,
        )


class _ListingIn(_In):
    dirs: list[_EntryIn] | None = None
    files: list[_EntryIn] | None = None


class _PodListIn(_In):
    pods: list[str] | None
    shared: list[str] | None = Field(None, alias="sharedPods")


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


def listing(body: bytes, endpoint: str) -> Listing:
    parsed = _parse(_ListingIn, body, endpoint)
    found = [item.entry(is_dir=True) for item in parsed.dirs or ()]
    found += [item.entry(is_dir=False) for item in parsed.files or ()]
    return Listing(tuple({entry.name: entry for entry in found}.values()))


def pod_list(body: bytes, endpoint: str) -> PodList:
    parsed = _parse(_PodListIn, body, endpoint)
    own = dict.fromkeys(parsed.pods or ())
    shared = dict.fromkeys(parsed.shared or ())
    return PodList(tuple(own), tuple(shared))


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
