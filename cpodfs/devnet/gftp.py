"""The ``gftp`` program of the local market, and how providers resolve the URLs that it makes.

Standard library only, and little of it: yapapi starts this program with every run, and waits.
A URL is a random token; the file behind it is named only in a 0700 registry folder that tasks
cannot see. A provider can thus reach what the requestor's gftp published, and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

GFTP_DIR_VARIABLE = "CPODFS_GFTP_DIR"
URL_PREFIX = "gftp://local/"
VERSION = "0.7.3"
"""What real gftp says from this version on lets yapapi withdraw what it has published."""

_INVALID_REQUEST, _NO_SUCH_METHOD, _INVALID_PARAMS, _SERVER_ERROR = -32600, -32601, -32602, -32000


class GftpError(Exception):
    """A URL that leads nowhere (any more), or a request that cannot be carried out."""


@dataclass(frozen=True)
class Link:
    """What is behind a URL: ``path`` may be read (``publish``) or replaced (``receive``)."""

    path: Path
    mode: str


class Registry:
    """The folder of published files: one JSON file for each URL, named by its token.

    A publisher holds a lock on a file of its own, ``<random>.alive``, while it lives: unlike a
    process id, that can be tested from another pid namespace. Tokens never contain a dot.
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
        return URL_PREFIX + token

    def remove(self, url: str) -> bool:
        """Withdraw a URL; whether there was one."""
        try:
            (self.folder / _token(url)).unlink()
        except (FileNotFoundError, GftpError):
            return False
        return True

    def resolve(self, url: str) -> Link:
        """What a URL stands for. Raises GftpError when it was never published or is withdrawn."""
        entry_path = self.folder / _token(url)
        try:
            entry = json.loads(entry_path.read_text())
        except (FileNotFoundError, ValueError):
            raise GftpError(f"{url}: not published") from None
        if not _locked(self.folder / entry["publisher"]):
            entry_path.unlink(missing_ok=True)
            raise GftpError(f"{url}: its requestor is gone")
        return Link(Path(entry["path"]), entry["mode"])


def _token(url: str) -> str:
    token = url.removeprefix(URL_PREFIX)
    if token == url or not token or not all(char.isalnum() or char in "-_" for char in token):
        raise GftpError(f"{url}: not a URL of this gftp")
    return token


def _locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
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
