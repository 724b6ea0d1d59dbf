"""What stays as it is while a run of it goes on: the code of a pod that somebody has vouched for.

Imports the cache. Trust is bound to a hash of what is here, and the server can have another version a
moment later. So from before the hash until the run's end nothing that is known of the code changes for
the server's sake: no listing of its folders is merged, none of its contents is evicted or fetched.
What is changed through this mount is changed. The holds that runs rely on are on the disk, as runs
outlive the driver.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path

from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a pod: all folders but ``without``, and of those ``within`` all the same. Paths are
    relative to the pod."""

    without: tuple[str, ...]
    within: tuple[str, ...]

    def covers(self, folder: str) -> bool:
        """Whether a folder belongs to it, or has one in it that does. The pod itself is ``""``."""
        if any(_is_in(folder, each) or _is_in(each, folder) for each in self.within):
            return True
        return not any(_is_in(folder, each) for each in self.without)


def _is_in(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


class Holds:
    """``path``: the file that survives the driver. A pod is known by its name, which it keeps as long
    as it is running."""

    def __init__(self, store: Store, path: Path) -> None:
        self._store = store
        self._path = path
        self._sealed = _load(path)
        self._begun: dict[str, Extent] = {}

    def begin(self, pod: str, extent: Extent) -> None:
        """From now on what is known of the extent stays as it is; what is not yet may be asked for."""
        self._begun[pod] = extent

    def seal(self, pod: str) -> None:
        """All that a run needs of the extent is here: it stays so until `end`, whatever becomes of
        this process. Raises OSError."""
        self._save(self._sealed | {pod: self._begun[pod]})
        del self._begun[pod]

    def is_sealed(self, pod: str) -> bool:
        """Whether a run relies on it, for all one knows."""
        return pod in self._sealed

    def end(self, pod: str) -> None:
        """What the server has to say of the pod is heard again."""
        self._begun.pop(pod, None)
        self.end_all_but({*self._sealed} - {pod})

    def end_all_but(self, pods: Container[str]) -> None:
        """An earlier driver's runs have ended, but of these pods."""
        left = {pod: extent for pod, extent in self._sealed.items() if pod in pods}
        if left != self._sealed:
            self._sealed = left
            try:
                self._save(left)
            except OSError as error:
                log.warning("holds not written, which the next mount makes up for: %s", error)

    def covers(self, ino: int) -> bool:
        """Whether it is code that a run needs, or is about to need."""
        return self.holding(ino) is not None

    def is_held(self, ino: int) -> bool:
        """Whether the server may not change it here: a folder that was listed, a file whose content is
        here, and once the hold is sealed everything."""
        found = self.holding(ino)
        if found is None:
            return False
        inode = self._store.get(ino)
        known = inode is not None and bool(inode.listed_s if inode.is_dir else inode.cached)
        return found in self._sealed or known

    def holding(self, ino: int) -> str | None:
        """The pod whose hold covers an inode: a folder in its extent, or what is directly in one."""
        if not self._sealed and not self._begun:
            return None
        above = self._store.ancestors(ino)
        if not above or above[-1].parent != ROOT:
            return None
        pod = above[-1].name or ""
        extent = self._sealed.get(pod) or self._begun.get(pod)
        if extent is None:
            return None
        folders = above if above[0].is_dir else above[1:]
        path = "/".join(inode.name or "" for inode in reversed(folders[:-1]))
        return pod if not path or extent.covers(path) else None

    def _save(self, sealed: dict[str, Extent]) -> None:
        """No sync: what a loss of power takes away, it takes from the runs as well."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps({pod: asdict(extent) for pod, extent in sealed.items()}))
        draft.replace(self._path)
        self._sealed = sealed


def _load(path: Path) -> dict[str, Extent]:
    try:
        found = json.loads(path.read_text())
        return {
            pod: Extent(tuple(each["without"]), tuple(each["within"]))
            for pod, each in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("holds of earlier runs cannot be read: %s: %s", path, error)
        return {}
