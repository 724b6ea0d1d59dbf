"""What the development server keeps: users, pods, sharing references, blobs of content.

Imports ``dfs_model`` and ``dfs_record``. SQLite in WAL mode plus one file per blob. Content is written to
``tmp/``, renamed into ``content/`` and only then named by a committed row, so a kill at any moment
leaves at most a file that nobody names; those are swept away at the next start. Everything is
called from one event loop and never awaits inside: a ``change()`` block is atomic.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpodfs.devnet.dfs_model import Refusal
from cpodfs.devnet.dfs_record import File

_SCHEMA = """
-- digest NULL: the account was deleted; the name stays taken, as it does in the real name service
CREATE TABLE IF NOT EXISTS users (
    name TEXT PRIMARY KEY, address TEXT NOT NULL, public_key TEXT NOT NULL,
    salt BLOB NOT NULL, digest BLOB);
-- what a user's pod list names; shared = received from somebody, read-only
CREATE TABLE IF NOT EXISTS pods (
    user TEXT NOT NULL, name TEXT NOT NULL, address TEXT NOT NULL, password TEXT NOT NULL,
    shared INTEGER NOT NULL, PRIMARY KEY (user, name));
-- path is the key ("/a/b"); parent and name are metadata, reported by stat
CREATE TABLE IF NOT EXISTS dirs (
    pod TEXT NOT NULL, path TEXT NOT NULL, parent TEXT NOT NULL, name TEXT NOT NULL,
    mode INTEGER NOT NULL, ctime INTEGER NOT NULL, mtime INTEGER NOT NULL, atime INTEGER NOT NULL,
    PRIMARY KEY (pod, path)) WITHOUT ROWID;
-- a directory's list; it may name what does not exist and name a thing twice, as the real one may
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, pod TEXT NOT NULL, dir TEXT NOT NULL, kind TEXT NOT NULL,
    name TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS entries_by_dir ON entries (pod, dir, name);
-- blob '' = empty content, no file
CREATE TABLE IF NOT EXISTS files (
    pod TEXT NOT NULL, path TEXT NOT NULL, parent TEXT NOT NULL, name TEXT NOT NULL,
    size INTEGER NOT NULL, block_size INTEGER NOT NULL, compression TEXT NOT NULL,
    content_type TEXT NOT NULL, mode INTEGER NOT NULL, ctime INTEGER NOT NULL,
    mtime INTEGER NOT NULL, atime INTEGER NOT NULL, blob TEXT NOT NULL,
    PRIMARY KEY (pod, path)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_by_blob ON files (blob);
-- kind 'pod' or 'file'; body is the JSON that the reference leads to
CREATE TABLE IF NOT EXISTS shares (
    ref TEXT PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, blob TEXT NOT NULL);
"""

_OLDER_MAX = 2


@dataclass(frozen=True)
class User:
    name: str
    address: str
    public_key: str


@dataclass(frozen=True)
class Pod:
    """A pod as one user's list names it. ``shared``: received, read-only."""

    name: str
    address: str
    password: str
    shared: bool


def scrypt(password: str, salt: bytes) -> bytes:
    """About 50 ms of work: call it in a thread."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


class Store:
    """The state folder. One per process; ``close()`` it."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._doomed: set[str] = set()
        self._set_aside: sqlite3.Connection | None = None
        self._open(state_dir)

    def _open(self, folder: Path) -> None:
        self._older: dict[tuple[str, str], list[File]] = {}
        self._content = folder / "content"
        self._temp = folder / "tmp"
        for needed in (folder, self._content, self._temp):
            needed.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "dfs.sqlite3"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = OFF")  # a kill is survived; a power cut need not be
        self.db.executescript(_SCHEMA)
        self._sweep()

    def close(self) -> None:
        self.db.close()
        if self._set_aside is not None:
            self._set_aside.close()

    @property
    def is_empty_one(self) -> bool:
        return self._set_aside is not None

    def use_empty_one(self) -> None:
        """Have an empty store with the same accounts until `use_full_one`."""
        folder = self._state_dir / "empty"
        shutil.rmtree(folder, ignore_errors=True)
        self._set_aside = self.db
        self._open(folder)
        users = self._set_aside.execute("SELECT * FROM users").fetchall()
        self.db.executemany("INSERT INTO users VALUES (?, ?, ?, ?, ?)", users)

    def use_full_one(self) -> None:
        """Have again what was there before `use_empty_one`."""
        assert self._set_aside is not None
        self._set_aside.close()
        self._set_aside = None
        self.db.close()
        self._open(self._state_dir)

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """All or nothing. Blobs passed to ``release`` are removed after the commit."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            self._doomed.clear()
            raise
        self.db.execute("COMMIT")
        for blob in self._doomed:
            if not self._is_named(blob):
                self.blob_path(blob).unlink(missing_ok=True)
        self._doomed.clear()

    # Content

    def temp_path(self) -> Path:
        return self._temp / secrets.token_hex(12)

    def adopt(self, temp: Path) -> str:
        """Move a finished temporary file among the blobs; returns its id."""
        blob = secrets.token_hex(16)
        target = self.blob_path(blob)
        try:
            temp.rename(target)
        except FileNotFoundError:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            temp.rename(target)
        return blob

    def blob_path(self, blob: str) -> Path:
        return self._content / blob[:2] / blob

    def release(self, blob: str) -> None:
        """To be called inside ``change()`` when a row stops naming ``blob``."""
        if blob:
            self._doomed.add(blob)

    def supersede(self, pod: str, path: str, old: File) -> None:
        """To be called inside ``change()`` when another version of a file takes the place of ``old``."""
        kept = self._older.setdefault((pod, path), [])
        kept.insert(0, old)
        for forgotten in kept[_OLDER_MAX:]:
            self.release(forgotten.blob)
        del kept[_OLDER_MAX:]

    def older(self, pod: str, path: str) -> list[File]:
        """Former versions of a file, the latest first: as long as this process lives."""
        return self._older.get((pod, path), [])

    def forget_older(self, pod: str, path: str) -> list[File]:
        """Former versions that are not kept any more."""
        return self._older.pop((pod, path), [])

    def _is_named(self, blob: str) -> bool:
        query = "SELECT 1 FROM files WHERE blob = ?1 UNION SELECT 1 FROM shares WHERE blob = ?1"
        return self.db.execute(query, (blob,)).fetchone() is not None

    def _sweep(self) -> None:
        for left_over in self._temp.iterdir():
            left_over.unlink()
        named = {row[0] for row in self.db.execute("SELECT blob FROM files")}
        named |= {row[0] for row in self.db.execute("SELECT blob FROM shares")}
        for path in self._content.glob("*/*"):
            if path.name not in named:
                path.unlink()

    # Users

    def user(self, name: str) -> User | None:
        query = "SELECT name, address, public_key FROM users WHERE name = ?"
        row = self.db.execute(query, (name,)).fetchone()
        return User(*row) if row else None

    def put_user(self, name: str, address: str, salt: bytes, digest: bytes) -> User:
        """Create the user or give it a new password."""
        public_key = "04" + hashlib.sha512(address.encode()).hexdigest()
        with self.change():
            self.db.execute(
                "INSERT INTO users VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE"
                " SET salt = excluded.salt, digest = excluded.digest",
                (name, address, public_key, salt, digest),
            )
        return User(name, address, public_key)

    def password_of(self, name: str) -> tuple[bytes, bytes | None]:
        query = "SELECT salt, digest FROM users WHERE name = ?"
        row = self.db.execute(query, (name,)).fetchone()
        return (row[0], row[1]) if row else (b"", None)

    def forget_password(self, name: str) -> None:
        self.db.execute("UPDATE users SET digest = NULL WHERE name = ?", (name,))

    # Pods

    def pods(self, user: str) -> list[Pod]:
        query = "SELECT name, address, password, shared FROM pods WHERE user = ? ORDER BY rowid"
        return [Pod(n, a, p, bool(s)) for n, a, p, s in self.db.execute(query, (user,))]

    def pod(self, user: str, name: str) -> Pod | None:
        query = "SELECT name, address, password, shared FROM pods WHERE user = ? AND name = ?"
        row = self.db.execute(query, (user, name)).fetchone()
        return Pod(row[0], row[1], row[2], bool(row[3])) if row else None

    def new_pod(self, user: str, name: str) -> Pod:
        """A pod with an empty root directory. The caller has checked the name."""
        pod = Pod(name, secrets.token_hex(20), secrets.token_hex(16), shared=False)
        now = int(time.time())
        with self.change():
            self._name_pod(user, pod)
            self.db.execute(
                "INSERT INTO dirs VALUES (?, '/', '', '/', 0, ?, ?, ?)",
                (pod.address, now, now, now),
            )
        return pod

    def keep_pods(self, user: str, names: set[str]) -> None:
        """Take all other pods off the user's list and leave alone what they hold."""
        others = [(user, pod.name) for pod in self.pods(user) if pod.name not in names]
        self.db.executemany("DELETE FROM pods WHERE user = ? AND name = ?", others)

    def add_shared_pod(self, user: str, pod: Pod) -> None:
        with self.change():
            self._name_pod(user, pod)

    def _name_pod(self, user: str, pod: Pod) -> None:
        row = (user, pod.name, pod.address, pod.password, pod.shared)
        self.db.execute("INSERT INTO pods VALUES (?, ?, ?, ?, ?)", row)

    def drop_pod(self, user: str, pod: Pod) -> None:
        """Take the pod off the user's list and, when it is the user's own, all it holds."""
        with self.change():
            self.db.execute("DELETE FROM pods WHERE user = ? AND name = ?", (user, pod.name))
            if pod.shared:
                return
            query = "SELECT blob FROM files WHERE pod = ?"
            for (blob,) in self.db.execute(query, (pod.address,)).fetchall():
                self.release(blob)
            self.db.execute("DELETE FROM files WHERE pod = ?", (pod.address,))
            self.db.execute("DELETE FROM entries WHERE pod = ?", (pod.address,))
            self.db.execute("DELETE FROM dirs WHERE pod = ?", (pod.address,))

    # Sharing references

    def new_share(self, kind: str, body: dict[str, Any], blob: str = "") -> str:
        """A reference (hex: 64 digits to a pod, 128 to a file) that leads to ``body`` for ever."""
        ref = secrets.token_hex(32 if kind == "pod" else 64)
        row = (ref, kind, json.dumps(body), blob)
        self.db.execute("INSERT INTO shares VALUES (?, ?, ?, ?)", row)
        return ref

    def share(self, kind: str, ref: str) -> dict[str, Any]:
        """Raises Refusal when nothing is there."""
        query = "SELECT body FROM shares WHERE kind = ? AND ref = ?"
        row = self.db.execute(query, (kind, ref.lower())).fetchone()
        if row is None:
            raise Refusal("Not Found")
        body: dict[str, Any] = json.loads(row[0])
        return body
