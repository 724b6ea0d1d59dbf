"""Whose code a pod's is: the record of the pods that may be run, and the hash that binds it.

Imports nothing of ours. The record is a file of the account outside every pod and outside the cache,
so that it survives an empty cache; only the driver, of which there is one per account, writes it.
The server does not say which pods were forked. So a pod is the user's own only when it was made
through a mount of this account on this machine, or when he says so; every other one is a stranger's
until he trusts what is in it. A name that the server takes away or brings is never own any more.
What was vouched for, file by file, is in a file beside the record, and with it what the pod's own
runs have made of it since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs

log = logging.getLogger(__name__)

VERSION = 1


def trust_file(cache_folder: Path) -> Path:
    """Where the record of an account is, whose cache is ``cache_folder``."""
    return platformdirs.user_state_path("cpodfs") / "trust" / f"{cache_folder.name}.json"


class Fingerprint:
    """A hash of named things, in which nothing can stand for something else.

    ``files`` is what went in: path, size in bytes, whether it may be executed. ``entries`` has for each
    path (the recipe's is empty) a text that differs when what is there differs.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"cpodfs pod 1\0")
        self.files: list[tuple[str, int, bool]] = []
        self.entries: dict[str, str] = {}

    def add(self, kind: str, path: str, content: bytes, *, executable: bool = False) -> None:
        """``kind``: what it is, one word. Takes time in proportion to the content."""
        name = path.encode("utf-8", "surrogatepass")
        head = f"{kind} {int(executable)} {len(name)} {len(content)}\n".encode()
        inner = hashlib.sha256(content)
        self._hash.update(head + name + inner.digest())
        self.files.append((path, len(content), executable))
        if kind == "recipe":
            self.entries[""] = f"recipe {inner.hexdigest()} {path}"
        else:
            self.entries[path] = f"{kind} {int(executable)} {inner.hexdigest()}"

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class Vouched:
    """What a user has looked at, as `Fingerprint.entries`. ``made``: what the pod's own runs have made of
    some paths since; None where they have removed what was there."""

    digest: str
    files: Mapping[str, str]
    made: Mapping[str, str | None] = field(default_factory=dict)

    def changed(self, now: Mapping[str, str]) -> list[str]:
        """The paths where there is something else now, which is not a run's own doing either."""
        return [path for path in self._paths(now) if not self._stands(path, now)]

    def with_made(self, now: Mapping[str, str], own: set[str]) -> Vouched:
        """What is to be noted when a run is over that has itself changed the paths ``own``."""
        made = {
            path: now.get(path)
            for path in self._paths(now)
            if now.get(path) != self.files.get(path) and (path in own or self._stands(path, now))
        }
        return replace(self, made=made)

    def _paths(self, now: Mapping[str, str]) -> list[str]:
        return sorted({*self.files, *now})

    def _stands(self, path: str, now: Mapping[str, str]) -> bool:
        here = now.get(path)
        return here == self.files.get(path) or (path in self.made and here == self.made[path])


class TrustBook:
    """The record. Every change is on the disk when the method returns; raises OSError if not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._noting = threading.Lock()
        self._pods: dict[str, dict[str, Any]] = _load(path)

    def is_own(self, pod: str) -> bool:
        return self._pods.get(pod, {}).get("own") is True

    def trusted(self, pod: str) -> str | None:
        """The hash of what is trusted of a pod that is not the user's own."""
        digest = self._pods.get(pod, {}).get("trusted")
        return digest if isinstance(digest, str) else None

    def is_boxed(self, pod: str, *, hires: bool = False) -> bool:
        """Whether its being trusted is about a run in a sandbox or elsewhere, as the user was told.

        ``hires``: its program is one for providers, of which earlier versions wrote neither.
        """
        entry = self._pods.get(pod, {})
        return bool(entry.get("boxed")) or (hires and not entry.get("bare"))

    def own(self, pod: str) -> None:
        """The pod is the user's own, whatever becomes of it."""
        self._set(pod, {"own": True})

    def trust(self, pod: str, digest: str, *, boxed: bool = False) -> None:
        """The pod may be run as long as its hash is this one; ``boxed``: not here without a sandbox.
        What is behind the hash is told by `note`."""
        self._set(pod, {"trusted": digest, "boxed" if boxed else "bare": True})

    def vouched(self, pod: str) -> Vouched | None:
        """What is behind the hash of a trusted pod; None if it is not known, as with those of earlier
        versions. Reads a file of up to some MiB: for a thread."""
        digest = self.trusted(pod)
        try:
            found = _read(self._sheet(pod))
            if digest is None or found["pod"] != pod or found["digest"] != digest:
                return None
            return Vouched(digest, dict(found["files"]), dict(found["made"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("what was trusted is not known pod=%r: %s", pod, error)
            return None

    def note(self, pod: str, vouched: Vouched) -> None:
        """What is behind the hash that is, or is about to be, trusted. For a thread. Raises OSError."""
        document = {"pod": pod, "digest": vouched.digest, "files": dict(vouched.files)}
        with self._noting:
            _write(self._sheet(pod), document | {"made": dict(vouched.made)})

    def _sheet(self, pod: str) -> Path:
        name = hashlib.sha256(pod.encode("utf-8", "surrogatepass")).hexdigest()
        return self._path.with_suffix(".vouched") / f"{name}.json"

    def forget(self, pod: str) -> bool:
        """Take back whatever was said of the pod; False when nothing was."""
        if pod not in self._pods:
            return False
        with contextlib.suppress(OSError):  # it counts only together with the hash
            self._sheet(pod).unlink()
        # Here at once: a full disk is no reason to go on trusting.
        self._pods = {name: entry for name, entry in self._pods.items() if name != pod}
        self._save(self._pods)
        return True

    def rename(self, old: str, new: str) -> None:
        """The pod has another name now."""
        entry = self._pods.get(old)
        if entry is None:
            self.forget(new)
            return
        rest = {name: other for name, other in self._pods.items() if name != old}
        self._save(rest | {new: entry})

    def _set(self, pod: str, entry: dict[str, Any]) -> None:
        if self._pods.get(pod) != entry:
            self._save(self._pods | {pod: entry})

    def _save(self, pods: dict[str, dict[str, Any]]) -> None:
        _write(self._path, {"pods": pods})
        self._pods = pods


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        json.dump({"version": VERSION, **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _read(path: Path) -> dict[str, Any]:
    """Raises OSError; ValueError for what is not ours, or not only ours to write."""
    with path.open() as file:
        info = os.fstat(file.fileno())
        if info.st_mode & 0o022 or info.st_uid != os.getuid():
            raise ValueError("others can write it")
        document = json.load(file)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError("not of this version")
    return document


def _load(path: Path) -> dict[str, dict[str, Any]]:
    """What is on the disk. A record that cannot be read, or that others can write, trusts nobody."""
    try:
        pods = _read(path)["pods"]
        return {str(name): entry for name, entry in pods.items() if isinstance(entry, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        log.warning("no pod is trusted: %s: %s", path, error)
        return {}
