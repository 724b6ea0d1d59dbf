"""What the server manages to read just now, of what it has: its lies of "not there".

Imports the devnet's own leaves. A server that cannot fetch a chunk answers as if the thing were not
there. How many chunks a thing takes, and what a session keeps in memory until it closes the pod, are
the real server's (commit bf04d9eb, seen with a proxy before its Swarm node). Which read fails depends
on the seed, the thing and how often it was read, never on time or order.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_session import Session
from cpodfs.devnet.dfs_store import Pod
from cpodfs.devnet.faults import FaultBox

_FEED = 1
_FILE_IN_FEED = 3
"""Its metadata (a feed), its list of blocks, its one block: directories and the list of pods."""


def reads_pod_list(box: FaultBox) -> bool:
    """Whether the user's list of pods can be read this time."""
    return not box.faults.pods_empty and box.reads("the list of pods", _FILE_IN_FEED)


@dataclass(frozen=True)
class Reads:
    """One session's reads of one pod. Paths are keys as in `dfs_model`."""

    box: FaultBox
    session: Session
    pod: Pod

    def directory(self, path: str) -> bool:
        """Its metadata and its list, which are one object."""
        return self._reads("D", m.dir_key(path), _FILE_IN_FEED)

    def file(self, path: str) -> bool:
        """Its metadata."""
        return self._reads("F", path, _FEED)

    def listed(self, folder: str, names: list[str], kind: str) -> set[str]:
        """Those of a directory's children of one kind ("D" or "F") that a listing shows.

        The metadata of directories may be in memory, that of files is fetched at every listing.
        """
        if not self.box.is_lying:
            self.session.remember(self.pod.address, "all " + kind, m.dir_key(folder))
            return set(names)
        if kind == "D":
            return {name for name in names if self.directory(m.join(folder, name))}
        return {name for name in names if self._fetch("F", m.join(folder, name), _FEED)}

    def block(self, path: str, number: int) -> bool:
        """A block of content; number -1 is the list of blocks. Never kept in memory."""
        return self.box.reads(f"{self.pod.name}{path} block {number}", 1)

    def remember(self, kind: str, path: str) -> None:
        """What was just written need not be read."""
        self.session.remember(self.pod.address, kind, path)

    def _reads(self, kind: str, path: str, chunks: int) -> bool:
        if self.box.is_hidden(self.pod.name, path):
            return False
        address = self.pod.address
        in_memory = self.session.remembers(address, kind, path) or self.session.remembers(
            address, "all " + kind, m.dir_key(m.parent_of(path))
        )
        return in_memory or self._fetch(kind, path, chunks)

    def _fetch(self, kind: str, path: str, chunks: int) -> bool:
        if self.box.is_hidden(self.pod.name, path):
            return False
        found = self.box.reads(f"{self.pod.name}{path} {kind}", chunks)
        if found:
            self.remember(kind, path)
        return found
