"""The ``gftp`` program of the local market, and how providers resolve the URLs that it makes.

Standard library only, and little of it: yapapi starts this program with every run, and waits.
A URL is a random token; the file behind it is named only in a 0700 registry folder that tasks
cannot see. A provider can thus reach what the requestor's gftp published, and nothing else. A
sandboxed requestor has a registry of its own (`runs.box`), where it may write what it likes: what
is read there is checked, and its files are opened without following a link.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cpodfs.runs import box

GFTP_DIR_VARIABLE = "CPODFS_GFTP_DIR"
URL_PREFIX = "gftp://local/"
VERSION = "0.7.3"
"""What real gftp says from this version on lets yapapi withdraw what it has published."""

_ENTRY_LIMIT_BYTES = 32 << 10

_INVALID_REQUEST, _NO_SUCH_METHOD, _INVALID_PARAMS, _SERVER_ERROR = -32600, -32601, -32602, -32000


class GftpError(Exception):
    """A URL that leads nowhere (any more), or a request that cannot be carried out."""


@dataclass(frozen=True)
class Link:
    """What is behind a URL: ``path`` may be read (``publish``) or replaced (``receive``).

    ``folders``: a path of a sandboxed requestor's must be in one of these; None: it is ours.
    """

    path: Path
    mode: str
    folders: tuple[Path, ...] | None = None

    def open_to_read(self) -> int:
        """A descriptor of the file. Raises OSError or GftpError."""
        if self.folders is None:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        with self.parent() as parent:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self.path.name, flags, dir_fd=parent)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise GftpError(f"{self.path.name}: not a regular file")
        return handle

    @contextlib.contextmanager
    def parent(self) -> Iterator[int]:
        """A descriptor of the folder that the file is in. Raises OSError or GftpError."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        inner: tuple[str, ...] = ()
        if self.folders is None:
            at = os.open(self.path.parent, flags)
        else:
            flags |= os.O_NOFOLLOW
            folder = next((f for f in self.folders if self.path.is_relative_to(f)), None)
            if folder is None or ".." in self.path.parts or folder == self.path:
                raise GftpError("a sandboxed program may offer files of its own pod only")
            at, inner = os.open(folder, flags), self.path.relative_to(folder).parts[:-1]
        try:
            for name in inner:
                below = os.open(name, flags, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)


class Registry:
    """The folder of published files: one JSON file for each URL, named by its token.

    A publisher holds a lock on a file of its own, ``<random>.alive``, while it lives: unlike a
    process id, that can be tested from another pid namespace. Tokens never contain a dot; the URLs
    of a box are its name, a dot, and the token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._alive: tuple[str, int] | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)

    def _publisher(self) -> str:
        """The name of this process's lock file, taken at first use."""
        if self._alive is None:
            name = f"{secrets.token_hex(8)}.alive"
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._alive = (name, handle)
        return self._alive[0]

    def close(self) -> None:
        """Give up the lock: all URLs of this process are dead now."""
        if self._alive is not None:
            (self.folder / self._alive[0]).unlink(missing_ok=True)
            os.close(self._alive[1])
            self._alive = None

    def add(self, path: Path, mode: str) -> str:
        """Publish an absolute path; its new URL."""
        token = secrets.token_urlsafe(24)
        entry = {"path": str(path), "mode": mode, "publisher": self._publisher()}
        target = self.folder / token
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        name = self.folder.name
        return f"{URL_PREFIX}{name}.{token}" if box.is_box(name) else URL_PREFIX + token

    def remove(self, url: str) -> bool:
        """Withdraw a URL; whether there was one."""
        try:
            home, token = self._place(url)
            (home / token).unlink()
        except (FileNotFoundError, GftpError):
            return False
        return True

    def resolve(self, url: str) -> Link:
        """What a URL stands for. Raises GftpError when it was never published or is withdrawn."""
        home, token = self._place(url)
        folders = None
        if home != self.folder:
            folders = tuple(map(Path, box.folders(str(home))))
            if not folders:
                raise GftpError(f"{url}: its requestor is gone")
        try:
            path, mode, publisher = _read_entry(home / token)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise GftpError(f"{url}: not published") from None
        if not _locked(home / publisher):
            (home / token).unlink(missing_ok=True)
            raise GftpError(f"{url}: its requestor is gone")
        return Link(path, mode, folders)

    def _place(self, url: str) -> tuple[Path, str]:
        """The folder that a URL's entry is in, and the entry's name."""
        rest = url.removeprefix(URL_PREFIX)
        name, dot, token = rest.rpartition(".")
        known = not dot or (box.is_box(name) and _is_token(name))
        if rest == url or not known or not _is_token(token) or box.is_box(token):
            raise GftpError(f"{url}: not a URL of this gftp")
        home = self.folder / name if dot and name != self.folder.name else self.folder
        return home, token


def _is_token(text: str) -> bool:
    return bool(text) and all(char.isalnum() or char in "-_" for char in text)


def _open_entry(path: Path) -> int:
    """What is in a box may be anything, of any size: a link, a pipe without a writer."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileNotFoundError(path)
    return handle


def _read_entry(path: Path) -> tuple[Path, str, str]:
    with os.fdopen(_open_entry(path), "rb") as file:
        entry = json.loads(file.read(_ENTRY_LIMIT_BYTES))
    target, mode, publisher = entry["path"], entry["mode"], entry["publisher"]
    if not all(isinstance(text, str) for text in (target, mode, publisher)):
        raise TypeError(path)
    if not publisher.endswith(".alive") or not _is_token(publisher.removesuffix(".alive")):
        raise ValueError(publisher)
    if b"\0" in os.fsencode(target) or not os.path.isabs(target):
        raise ValueError(target)
    return Path(target), mode, publisher


def _locked(path: Path) -> bool:
    try:
        with os.fdopen(_open_entry(path), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    path.unlink(missing_ok=True)
    return False


class Server:
    """``gftp server``: one JSON-RPC 2.0 request a line, one answer a line, until shutdown or EOF."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._ours: set[str] = set()
        self.stopped = False

    def close_all(self) -> None:
        for url in self._ours:
            self._registry.remove(url)
        self._ours.clear()
        self._registry.close()

    def answer(self, line: str) -> str:
        """The answer to one line, always JSON."""
        try:
            request = json.loads(line)
            method, params = request["method"], request.get("params") or {}
            key = request.get("id")
        except (ValueError, TypeError, KeyError, AttributeError):
            return _error(None, _INVALID_REQUEST, "not a JSON-RPC request")
        handler = getattr(self, f"do_{method}", None) if isinstance(method, str) else None
        if handler is None:
            return _error(key, _NO_SUCH_METHOD, f"no such method: {method}")
        try:
            result = handler(**params) if isinstance(params, dict) else handler(*params)
        except TypeError as error:
            return _error(key, _INVALID_PARAMS, str(error))
        except (GftpError, OSError) as error:
            return _error(key, _SERVER_ERROR, str(error))
        return json.dumps({"jsonrpc": "2.0", "id": key, "result": result})

    def do_version(self) -> str:
        return VERSION

    def do_publish(self, files: list[str]) -> list[dict[str, str]]:
        paths = [Path(name).absolute() for name in files]
        for path in paths:
            if not path.is_file():
                raise GftpError(f"{path}: no such file")
        return [
            {"file": name, "url": self._add(path, "publish")}
            for name, path in zip(files, paths, strict=True)
        ]

    def do_receive(self, output_file: str) -> dict[str, str]:
        path = Path(output_file).absolute()
        if not path.parent.is_dir():
            raise GftpError(f"{path.parent}: no such folder")
        return {"file": output_file, "url": self._add(path, "receive")}

    def do_upload(self, file: str, url: str) -> dict[str, str]:
        link = self._registry.resolve(url)
        if link.mode != "receive":
            raise GftpError(f"{url}: cannot be written to")
        link.path.write_bytes(Path(file).read_bytes())
        return {"file": file, "url": url}

    def do_close(self, urls: list[str]) -> list[str]:
        self._ours.difference_update(urls)
        return ["ok" if self._registry.remove(url) else "error" for url in urls]

    def do_shutdown(self) -> str:
        self.stopped = True
        self.close_all()
        return "ok"

    def _add(self, path: Path, mode: str) -> str:
        url = self._registry.add(path, mode)
        self._ours.add(url)
        return url


def _error(key: Any, code: int, message: str) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": key, "error": {"code": code, "message": message}})


def serve(registry: Registry, requests: IO[str], answers: IO[str]) -> None:
    """Answer until shutdown or the end of input; whatever was published is withdrawn then."""
    server = Server(registry)
    try:
        for line in requests:
            if not line.strip():
                continue
            answers.write(server.answer(line) + "\n")
            answers.flush()
            if server.stopped:
                return
    finally:
        server.close_all()


def main(argv: list[str]) -> int:
    if argv in (["version"], ["--version"], ["-V"]):
        print(f"gftp {VERSION} (cpodfs devnet)")
        return 0
    if argv != ["server"]:
        print("usage: gftp server | gftp --version", file=sys.stderr)
        return 2
    folder = os.environ.get(GFTP_DIR_VARIABLE)
    if not folder:
        print(f"gftp: {GFTP_DIR_VARIABLE} is not set: started outside a run?", file=sys.stderr)
        return 1
    try:
        serve(Registry(Path(folder)), sys.stdin, sys.stdout)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
