"""One pod's directories and files, with the real server's order of steps and its mistakes.

Imports the devnet's own leaves. Metadata and directory lists are separate things: a list may
name what is gone, and a file may exist that no list names. Each public mutation is one transaction
except where the real server leaves its first half behind on an error that comes later; those places
say so. ``rmdir_bug``: removing a nested directory edits the grandparent's list instead of the
parent's, which is what the real server was seen to do.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_model import Refusal
from cpodfs.devnet.dfs_reads import Reads
from cpodfs.devnet.dfs_record import (
    FILE_COLUMNS,
    Content,
    File,
    dir_entry,
    file_entry,
    file_metadata,
)
from cpodfs.devnet.dfs_store import Store

_BEYOND_ALL_IDS = 1 << 62


def _version(versions: list[File], back: int | None) -> File | None:
    return None if back is None else versions[back]


def _entry(file: File) -> dict[str, Any]:
    times = (file.ctime, file.mtime, file.atime)
    return file_entry(file.name, file.content_type, file.size, file.block_size, file.mode, *times)


class Tree:
    """``writable`` is False in a received pod: every change is refused.

    ``reads`` None: all that there is can be read.
    """

    def __init__(
        self,
        store: Store,
        pod: str,
        *,
        writable: bool = True,
        rmdir_bug: bool = True,
        reads: Reads | None = None,
    ) -> None:
        self._store = store
        self._db = store.db
        self.pod = pod
        self._writable = writable
        self._rmdir_bug = rmdir_bug
        self._reads = reads

    # Looking

    def has_dir(self, path: str) -> bool:
        """Raises Panic where the real server takes a file's metadata for a directory's."""
        query = "SELECT 1 FROM dirs WHERE pod = ? AND path = ?"
        if self._db.execute(query, (self.pod, m.dir_key(path))).fetchone() is not None:
            return self._reads is None or self._reads.directory(path, lambda: self._count(path))
        is_index = m.base_of(path) == m.INDEX_NAME and self.has_dir(m.parent_of(path))
        if is_index or self.file(path) is not None:
            raise m.Panic(path)
        return False

    def file(self, path: str) -> File | None:
        """As it is read now: perhaps an older version, or nothing."""
        newest = self._newest(path)
        if newest is None or self._reads is None:
            return newest
        older = self._store.older(self.pod, path)
        return _version([newest, *older], self._reads.file(path, len(older)))

    def _newest(self, path: str) -> File | None:
        query = f"SELECT {FILE_COLUMNS} FROM files WHERE pod = ? AND path = ?"  # noqa: S608 - constant
        row = self._db.execute(query, (self.pod, path)).fetchone()
        return File(*row) if row else None

    def _listed_file(self, path: str) -> File | None:
        assert self._reads is not None
        older = self._store.older(self.pod, path)
        back = self._reads.listed_file(path, len(older))
        return self.file(path) if back is not None else None

    def need_file(self, path: str) -> File:
        found = self.file(path)
        if found is None:
            raise Refusal(m.FILE_NOT_FOUND)
        return found

    def entries(self, path: str) -> list[tuple[str, str]]:
        """(kind, name) in the order in which they were added; kind is 'D' or 'F'."""
        query = "SELECT kind, name FROM entries WHERE pod = ? AND dir = ? AND id < ? ORDER BY id"
        return self._db.execute(query, (self.pod, m.dir_key(path), self._unseen(path))).fetchall()

    def ls(self, path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Directories and files, in no order; names without metadata are left out in silence.

        So are those whose metadata cannot be read.
        """
        self._need_dir(path)
        key = (self.pod, m.dir_key(path), self._unseen(path))
        prefix = m.join(path, "")
        prefix = prefix if prefix.endswith("/") else prefix + "/"
        dirs = self._db.execute(
            "SELECT DISTINCT d.name, d.mode, d.ctime, d.mtime, d.atime FROM entries e JOIN dirs d"
            " ON d.pod = e.pod AND d.path = ?4 || e.name"
            " WHERE e.pod = ?1 AND e.dir = ?2 AND e.id < ?3 AND e.kind = 'D' ORDER BY random()",
            (*key, prefix),
        ).fetchall()
        files = self._db.execute(
            "SELECT DISTINCT f.name, f.content_type, f.size, f.block_size, f.mode, f.ctime, f.mtime, f.atime"
            " FROM entries e JOIN files f ON f.pod = e.pod AND f.path = ?4 || e.name"
            " WHERE e.pod = ?1 AND e.dir = ?2 AND e.id < ?3 AND e.kind = 'F' ORDER BY random()",
            (*key, prefix),
        ).fetchall()
        if self._reads is not None and self._reads.are_sure:
            self._reads.listed_all(path)
        elif self._reads is not None:
            dirs = [row for row in dirs if self.has_dir(prefix + row[0])]
            shown = (self._listed_file(prefix + row[0]) for row in files)
            return [dir_entry(*row) for row in dirs], [_entry(file) for file in shown if file]
        return [dir_entry(*row) for row in dirs], [file_entry(*row) for row in files]

    def stat_dir(self, pod_name: str, path: str) -> dict[str, Any]:
        if path != "/":
            parent = m.parent_of(path)
            if not self.has_dir(parent) or ("D", m.base_of(path)) not in self.entries(parent):
                raise Refusal(m.DIR_NOT_PRESENT)
        self._need_dir(path)
        query = (
            "SELECT parent, name, mode, ctime, mtime, atime FROM dirs WHERE pod = ? AND path = ?"
        )
        row = self._db.execute(query, (self.pod, m.dir_key(path))).fetchone()
        kinds = [kind for kind, _ in self.entries(path)]
        return {
            "podName": pod_name,
            "dirPath": row[0],
            "dirName": row[1],
            "mode": row[2],
            "creationTime": str(row[3]),
            "modificationTime": str(row[4]),
            "accessTime": str(row[5]),
            "noOfDirectories": str(kinds.count("D")),
            "noOfFiles": str(kinds.count("F")),
        }

    def stat_file(self, pod_name: str, path: str) -> dict[str, Any]:
        parent = m.parent_of(path)
        if self.has_dir(parent) and not self._is_listed(parent, "F", m.base_of(path)):
            raise Refusal(m.FILE_NOT_FOUND)
        found = self.need_file(path)
        return {
            "podName": pod_name,
            "mode": found.mode,
            "filePath": found.parent,
            "fileName": found.name,
            "fileSize": str(found.size),
            "blockSize": str(found.block_size),
            "compression": found.compression,
            "contentType": found.content_type,
            "creationTime": str(found.ctime),
            "modificationTime": str(found.mtime),
            "accessTime": str(found.atime),
        }

    def snapshot(self, path: str) -> dict[str, Any]:
        """The whole tree below ``path`` with its metadata."""
        if not self.has_dir(path):
            raise Refusal(f"list dir : feed does not exist or was not updated yet for {path}")
        query = "SELECT name, mode, ctime, mtime, atime FROM dirs WHERE pod = ? AND path = ?"
        row = self._db.execute(query, (self.pod, m.dir_key(path))).fetchone()
        shot = dir_entry(*row) | {"fileList": [], "dirList": []}
        for kind, name in self.entries(path):
            child = m.join(path, name)
            if kind == "D" and self.has_dir(child):
                shot["dirList"].append(self.snapshot(child))
            elif kind == "F" and (found := self.file(child)) is not None:
                shot["fileList"].append(file_metadata(found))
        return shot

    def index_json(self, path: str, *, adding: str) -> bytes:
        """What the directory's own file holds once ``adding`` is listed in it."""
        names = [f"_{kind}_{name}" for kind, name in self.entries(path)] + [f"_F_{adding}"]
        return json.dumps({"meta": {"name": m.base_of(path)}, "fileOrDirNames": names}).encode()

    # Directories

    def mkdir(self, path: str) -> None:
        parent, name = m.parent_of(path), m.base_of(path)
        if not name or name.startswith("/"):
            raise Refusal("invalid directory name")
        if len(name.encode()) > m.DIR_NAME_MAX:
            raise Refusal("too long directory name")
        self._need_dir(parent)
        key = m.join(parent, name)
        if self.has_dir(key):
            raise Refusal(m.DIR_EXISTS)
        self._need_writable()
        now = int(time.time())
        with self._store.change():
            row = (self.pod, key, parent, name, m.MODE_DIR, now, now, now)
            # One that is there and could not be read is replaced, list and all.
            self._db.execute("INSERT OR REPLACE INTO dirs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._db.execute("DELETE FROM entries WHERE pod = ? AND dir = ?", (self.pod, key))
            self._wrote("D", key)
            self._list(parent, "D", name)

    def rmdir(self, path: str) -> None:
        """Recursive, as at the real server."""
        _check_removable(path)
        self._need_dir(m.join(m.parent_of(path), m.base_of(path)))
        self._need_writable()
        with self._store.change():
            self._remove_tree(path)

    def empty_root(self) -> None:
        """First half of a pod's deletion. Raises Refusal where a list names what is gone."""
        with self._store.change():
            self._remove_children("/")

    def chmod_dir(self, path: str, mode: int) -> None:
        if not self.has_dir(path):
            raise Refusal(f"dir chmod: {m.DIR_NOT_PRESENT}")
        self._need_writable()
        with self._store.change():
            self._store_list_anew(path)
            self._db.execute(
                "UPDATE dirs SET mode = ?, atime = ? WHERE pod = ? AND path = ?",
                (m.S_IFDIR | mode, int(time.time()), self.pod, m.dir_key(path)),
            )

    def rename_dir(self, old: str, new: str) -> None:
        """Atomic here. With the parent of ``new`` missing the tree moves and is listed nowhere."""
        parent, name = m.parent_of(old), m.base_of(old)
        if name.startswith("/"):
            raise Refusal("invalid directory name")
        if len(name.encode()) > m.DIR_NAME_MAX:
            raise Refusal("too long directory name")
        self._need_dir(old)
        self._need_dir(parent)
        if self.has_dir(new):
            raise Refusal(m.DIR_EXISTS)
        self._need_writable()
        new_parent, new_name = m.parent_of(new), m.base_of(new)
        with self._store.change():
            self._move_tree(m.dir_key(old), m.dir_key(new), new_parent, new_name)
            self._unlist(parent, "D", name)
            if self.has_dir(new_parent):
                self._list(new_parent, "D", new_name)
        self._need_dir(new_parent)

    # Files

    def put_file(
        self,
        path: str,
        name: str,
        content: Content,
        *,
        block: int,
        compression: str,
        overwrite: bool,
    ) -> None:
        """Upload. On a refusal the old version is already unlisted or the new one is unlisted."""
        key = m.join(path, name)
        found = self.file(key)
        self._need_writable()
        if found is not None:
            with self._store.change():
                if not overwrite:
                    self._keep_old_version(found, path, key)
                self._unlist(path, "F", name)
        if not m.BLOCK_MIN <= block <= m.BLOCK_MAX:
            bounds = f"{m.BLOCK_MIN} - {m.BLOCK_MAX} (1Mb - 8Mb)"
            raise Refusal(f"upload: block size must be between {bounds}")
        now = int(time.time())
        kind = content.content_type
        new = File(
            path,
            name,
            content.size,
            block,
            compression,
            kind,
            m.MODE_FILE,
            now,
            now,
            now,
            content.blob,
        )
        with self._store.change():
            self.store_file(key, new)
            self._wrote("F", key)
            if self.has_dir(path):
                self._list(path, "F", name)
        self._need_dir(path)

    def store_file(self, key: str, file: File) -> None:
        """Write metadata, inside ``change()``; no directory list is touched."""
        old = self._newest(key)
        if old is not None and old.blob != file.blob:
            self._store.supersede(self.pod, key, old)
        values = tuple(vars(file).values())
        marks = ", ".join("?" * (2 + len(values)))
        self._db.execute(
            f"INSERT OR REPLACE INTO files (pod, path, {FILE_COLUMNS}) VALUES ({marks})",  # noqa: S608 - constant
            (self.pod, key, *values),
        )

    def replace_content(self, path: str, content: Content) -> None:
        """Give a file other content; no directory list is touched."""
        self._need_writable()
        found = self.need_file(path)
        new = replace(found, blob=content.blob, size=content.size, mtime=int(time.time()))
        with self._store.change():
            self.store_file(path, new)

    def add_received(self, path: str, file: File) -> str:
        """Put a shared file's metadata into directory ``path``; returns its path."""
        key = m.join(path, file.name)
        if self.file(key) is not None:
            raise Refusal("file already present in the destination dir")
        self._need_writable()
        with self._store.change():
            self.store_file(key, file)
            if self.has_dir(path):
                self._list(path, "F", file.name)
        self._need_dir(path)
        return key

    def rm_file(self, path: str) -> None:
        if not self._writable:
            raise Refusal(m.READ_ONLY_POD)
        parent = m.parent_of(path)
        with self._store.change():
            self._remove_file(path)
            if self.has_dir(parent):
                self._unlist(parent, "F", m.base_of(path))
        self._need_dir(parent)

    def chmod_file(self, path: str, mode: int) -> None:
        self._need_writable()
        self.need_file(path)
        with self._store.change():
            self._db.execute(
                "UPDATE files SET mode = ?, atime = ? WHERE pod = ? AND path = ?",
                (m.S_IFREG | mode, int(time.time()), self.pod, path),
            )

    def rename_file(self, old: str, new: str) -> None:
        """With the new directory missing the file moves all the same and is listed nowhere."""
        if self.file(old) is None:
            raise Refusal("file not present")
        if self.file(new) is not None:
            raise Refusal("file already exist with new name")
        self._need_writable()
        parent, name, old_parent = m.parent_of(new), m.base_of(new), m.parent_of(old)
        with self._store.change():
            self._db.execute(
                "UPDATE OR REPLACE files SET path = ?, parent = ?, name = ?, mtime = ?"
                " WHERE pod = ? AND path = ?",
                (new, parent, name, int(time.time()), self.pod, old),
            )
            if self.has_dir(parent):
                self._list(parent, "F", name)
                if self.has_dir(old_parent):
                    self._unlist(old_parent, "F", m.base_of(old))
        self._need_dir(parent)
        self._need_dir(old_parent)

    # Lists, as the lost-update fault needs them

    def lists(self, paths: set[str]) -> dict[str, list[tuple[str, str]]]:
        return {path: self.entries(path) for path in paths if self.has_dir(path)}

    def restore_lists(self, lists: dict[str, list[tuple[str, str]]]) -> None:
        """Put older lists back: what was added in between is listed no more."""
        with self._store.change():
            for path, entries in lists.items():
                if not self.has_dir(path):
                    continue
                key = (self.pod, m.dir_key(path))
                self._db.execute("DELETE FROM entries WHERE pod = ? AND dir = ?", key)
                rows = [(*key, kind, name) for kind, name in entries]
                query = "INSERT INTO entries (pod, dir, kind, name) VALUES (?, ?, ?, ?)"
                self._db.executemany(query, rows)

    # Inside a change

    def _wrote(self, kind: str, path: str) -> None:
        if self._reads is not None:
            self._reads.wrote(kind, path)

    def _count(self, path: str) -> int:
        query = "SELECT count(*) FROM entries WHERE pod = ? AND dir = ?"
        return int(self._db.execute(query, (self.pod, m.dir_key(path))).fetchone()[0])

    def _unseen(self, path: str) -> int:
        """Entries from this id on are not in the version of the directory's list that was read."""
        count = 0 if self._reads is None else self._reads.unseen(path)
        if not count:
            return _BEYOND_ALL_IDS
        query = "SELECT id FROM entries WHERE pod = ? AND dir = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
        return int(self._db.execute(query, (self.pod, m.dir_key(path), count - 1)).fetchone()[0])

    def _store_list_anew(self, path: str) -> None:
        """Directories are stored whole, as they were read."""
        first = self._unseen(path)
        if first != _BEYOND_ALL_IDS and self._reads is not None and self._reads.lose_what_is_unseen:
            query = "DELETE FROM entries WHERE pod = ? AND dir = ? AND id >= ?"
            self._db.execute(query, (self.pod, m.dir_key(path), first))
        self._wrote("D", m.dir_key(path))

    def _need_dir(self, path: str) -> None:
        if not self.has_dir(path):
            raise Refusal(m.DIR_NOT_PRESENT)

    def _need_writable(self) -> None:
        if not self._writable:
            raise Refusal(m.READ_ONLY_FEED)

    def _is_listed(self, path: str, kind: str, name: str) -> bool:
        query = (
            "SELECT 1 FROM entries WHERE pod = ? AND dir = ? AND kind = ? AND name = ? AND id < ?"
        )
        key = (self.pod, m.dir_key(path), kind, name, self._unseen(path))
        return self._db.execute(query, key).fetchone() is not None

    def _list(self, path: str, kind: str, name: str) -> None:
        self._need_dir(path)
        self._store_list_anew(path)
        row = (self.pod, m.dir_key(path), kind, name)
        self._db.execute("INSERT INTO entries (pod, dir, kind, name) VALUES (?, ?, ?, ?)", row)
        self._touch(path)

    def _unlist(self, path: str, kind: str, name: str) -> None:
        self._need_dir(path)
        self._store_list_anew(path)
        query = "DELETE FROM entries WHERE pod = ? AND dir = ? AND kind = ? AND name = ?"
        self._db.execute(query, (self.pod, m.dir_key(path), kind, name))
        self._touch(path)

    def _touch(self, path: str) -> None:
        row = (int(time.time()), self.pod, m.dir_key(path))
        self._db.execute("UPDATE dirs SET mtime = ? WHERE pod = ? AND path = ?", row)

    def _remove_file(self, path: str) -> None:
        self.need_file(path)
        for version in (self._newest(path), *self._store.forget_older(self.pod, path)):
            self._store.release(version.blob if version else "")
        self._db.execute("DELETE FROM files WHERE pod = ? AND path = ?", (self.pod, path))

    def _remove_tree(self, path: str) -> None:
        _check_removable(path)
        self._need_dir(path)
        self._remove_children(path)
        key = m.dir_key(path)
        self._db.execute("DELETE FROM entries WHERE pod = ? AND dir = ?", (self.pod, key))
        self._db.execute("DELETE FROM dirs WHERE pod = ? AND path = ?", (self.pod, key))
        if key == "/":
            return
        self._unlist(self._list_that_rmdir_edits(path), "D", m.base_of(path))

    def _list_that_rmdir_edits(self, path: str) -> str:
        parent = m.parent_of(path)
        return m.parent_of(parent) if self._rmdir_bug else parent

    def _remove_children(self, path: str) -> None:
        for kind, name in self.entries(path):
            child = m.join(path, name)
            if kind == "F":
                self._remove_file(child)
            else:
                self._remove_tree(child)

    def _keep_old_version(self, old: File, path: str, key: str) -> None:
        now = int(time.time())
        name = f"{now}_{old.name}"
        self._db.execute(
            "UPDATE OR REPLACE files SET path = ?, name = ?, mtime = ? WHERE pod = ? AND path = ?",
            (m.join(path, name), name, now, self.pod, key),
        )
        self._list(path, "F", name)

    def _move_tree(self, old: str, new: str, parent: str, name: str) -> None:
        now, cut = int(time.time()), len(old) + 1
        inside = (self.pod, old + "/", old + "0")  # "0" follows "/" in the order of code points
        self._forget_moved_names(old)
        for table, column in (("files", "path"), ("dirs", "path"), ("entries", "dir")):
            self._db.execute(
                f"UPDATE OR REPLACE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608 - constants
                f" WHERE pod = ? AND {column} >= ? AND {column} < ?",
                (new, cut, *inside),
            )
        moved = (self.pod, new + "/", new + "0")
        for table in ("files", "dirs"):
            self._db.execute(
                f"UPDATE {table} SET parent = ? || substr(parent, ?), mtime = ?"  # noqa: S608 - constants
                " WHERE pod = ? AND path >= ? AND path < ?",
                (new, cut, now, *moved),
            )
        self._db.execute(
            "UPDATE entries SET dir = ? WHERE pod = ? AND dir = ?", (new, self.pod, old)
        )
        self._db.execute(
            "UPDATE dirs SET path = ?, parent = ?, name = ?, mtime = ? WHERE pod = ? AND path = ?",
            (new, parent, name, now, self.pod, old),
        )

    def _forget_moved_names(self, old: str) -> None:
        """The real server removes each moved sub-directory as rmdir does, with the same mistake."""
        if not self._rmdir_bug:
            return
        for kind, name in self.entries(old):
            if kind == "D":
                child = m.join(old, name)
                self._forget_moved_names(child)
                grandparent = m.parent_of(old)
                if self.has_dir(grandparent):
                    self._unlist(grandparent, "D", name)


def _check_removable(path: str) -> None:
    if not path or m.parent_of(path) == "." or m.base_of(path) == ".":
        raise Refusal("invalid directory name")
