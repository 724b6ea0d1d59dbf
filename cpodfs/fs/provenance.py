"""Who changes a pod while a trusted run of it goes on: the run itself, or anybody else.

Imports the cache's store. Trust must not end by a run's own doing, and must not be extended to what
others do meanwhile. Of a pod that is watched, each change through the mount is told here with the task
that made it, while that waits for its answer. Whatever was changed by others as well counts as
theirs. Nothing is remembered beyond this process: who cannot be told counts as another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cpodfs.cache.store import Store


@dataclass(slots=True)
class _Watch:
    """``inos``: what others have changed, or had open for writing. ``gone``: paths, relative to the pod,
    where they have taken something away."""

    by_run: bool = False
    inos: set[int] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)


class Provenance:
    """``holding(ino)``: the pod of an inode on which trust depends, or None. ``is_of_run(pod, task)``:
    whether a thread or process belongs to the pod's run."""

    def __init__(
        self,
        store: Store,
        holding: Callable[[int], str | None],
        is_of_run: Callable[[str, int], bool],
    ) -> None:
        self._store = store
        self._holding = holding
        self._is_of_run = is_of_run
        self._watched: dict[str, _Watch] = {}
        self._writers: dict[int, tuple[int, bool]] = {}

    # -- a run's time -----------------------------------------------------------------------------

    def begin(self, pod: str) -> None:
        """From now on what is not the doing of the pod's run is remembered."""
        others = {ino for ino, of_run in self._writers.values() if not of_run}
        self._watched[pod] = _Watch(inos=others)

    def end(self, pod: str) -> None:
        self._watched.pop(pod, None)

    def wrote(self, pod: str) -> bool:
        """Whether the run has changed anything on which trust depends."""
        watch = self._watched.get(pod)
        return watch is not None and watch.by_run

    def is_own_doing(self, pod: str, root: int, path: str) -> bool:
        """Whether nobody but the run can have changed what is at a path, or was. ``root``: the pod's
        inode number; the path is relative to it."""
        watch = self._watched.get(pod)
        if watch is None or not watch.by_run:
            return False
        ino, walked = root, ""
        for name in path.split("/"):
            walked = f"{walked}/{name}" if walked else name
            if walked in watch.gone:
                return False
            child = self._store.child(ino, name)
            if child is None:
                return True
            if child.ino in watch.inos:
                return False
            ino = child.ino
        return True

    # -- changes through the mount ----------------------------------------------------------------

    def changed(self, ino: int, task: int) -> None:
        """A task has made, moved or changed what has this inode number, or is about to write to it."""
        watch, of_run = self._told(ino, task)
        if watch is not None and not of_run:
            watch.inos.add(ino)

    def removed(self, parent: int, name: str, task: int) -> None:
        """A task has taken a name away from a directory."""
        watch, of_run = self._told(parent, task)
        if watch is not None and not of_run:
            names = [inode.name or "" for inode in self._store.ancestors(parent)]
            watch.gone.add("/".join([*reversed(names[:-1]), name]))

    def opened(self, handle: int, ino: int, task: int) -> None:
        """A handle for writing."""
        watch, of_run = self._told(ino, task)
        if watch is not None and not of_run:
            watch.inos.add(ino)
        self._writers[handle] = ino, of_run

    def closed(self, handle: int) -> None:
        self._writers.pop(handle, None)

    def is_writer(self, handle: int) -> bool:
        """Whether a handle was opened for writing."""
        return handle in self._writers

    def _told(self, ino: int, task: int) -> tuple[_Watch | None, bool]:
        """The watch that a change is told to, if to any, and whether its run has made it."""
        if not self._watched or (pod := self._holding(ino)) is None:
            return None, False
        watch = self._watched.get(pod)
        if watch is None:
            return None, False
        of_run = self._is_of_run(pod, task)
        watch.by_run |= of_run
        return watch, of_run
