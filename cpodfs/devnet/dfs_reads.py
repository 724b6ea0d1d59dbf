"""What the server manages to read just now, of what it has: its lies of "not there".

Imports the devnet's own leaves. A server that cannot fetch a chunk answers as if the thing were not
there, or as if it were what it was before. How many chunks a thing takes, and what a session keeps
in memory until it closes the pod, are the real server's (commit bf04d9eb, measured with a proxy
before its Swarm node that loses 40 % of reads). Which read fails depends on the seed, the thing and
how often it was read, never on time or order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_session import Session
from cpodfs.devnet.dfs_store import Pod
from cpodfs.devnet.faults import FaultBox

_FEED = 1
_FILE_IN_FEED = 3
"""Its metadata (a feed), its list of blocks, its one block: directories and the list of pods."""


def readable_pods(box: FaultBox, pods: list[Pod]) -> list[Pod] | None:
    """The list of pods as it is read this time, perhaps an older one; None when it cannot be."""
    back = None if box.faults.pods_empty else box.finds("the list of pods", _FILE_IN_FEED)
    if back is None:
        return None
    return [pod for pod in pods[: len(pods) - back] if not box.is_hidden(pod.name)]


@dataclass(frozen=True)
class Reads:
    """One session's reads of one pod. Paths are keys as in `dfs_model`."""

    box: FaultBox
    session: Session
    pod: Pod

    def directory(self, path: str, entries: Callable[[], int]) -> bool:
        """Its metadata and its list, which are one object; the list has so many ``entries``."""
        path = m.dir_key(path)
        if self.box.is_hidden(self.pod.name, path):
            return False
        if ("D", path) in self._memory or ("all", m.parent_of(path)) in self._memory:
            return True
        back = self.box.finds(f"{self.pod.name}{path} D", _FILE_IN_FEED)
        if back is None or (back and back > entries()):
            return False
        self._memory["D", path] = back
        return True

    def unseen(self, path: str) -> int:
        """How many of the newest entries of a directory's list are not in the version in memory."""
        return self._memory.get(("D", m.dir_key(path)), 0)

    def file(self, path: str, older: int) -> int | None:
        """Which version of its metadata is found: 0 the newest, then one of so many ``older``."""
        if self.box.is_hidden(self.pod.name, path):
            return None
        if ("F", path) in self._memory:
            return min(self._memory["F", path], older)
        if ("all", m.parent_of(path)) in self._memory:
            return 0
        return self.listed_file(path, older)

    @property
    def lose_what_is_unseen(self) -> bool:
        return self.box.faults.stale_writes

    @property
    def are_sure(self) -> bool:
        """Nothing fails."""
        return not self.box.is_lying

    def listed_all(self, folder: str) -> None:
        """A listing has read everything in the directory."""
        self._memory["all", m.dir_key(folder)] = 0

    def listed_file(self, path: str, older: int) -> int | None:
        """The same of a listing, which fetches it whether it is in memory or not."""
        if self.box.is_hidden(self.pod.name, path):
            return None
        back = self.box.finds(f"{self.pod.name}{path} F", _FEED)
        if back is None or back > older:
            return None
        self._memory["F", path] = back
        return back

    def block(self, path: str, number: int) -> bool:
        """A block of content; number -1 is the list of blocks. Never kept in memory."""
        return self.box.finds(f"{self.pod.name}{path} block {number}", 1) == 0

    def wrote(self, kind: str, path: str) -> None:
        """What was just written ("D" or "F") is in memory, as it is."""
        self._memory[kind, path] = 0

    @property
    def _memory(self) -> dict[tuple[str, str], int]:
        return self.session.memory(self.pod.address)
