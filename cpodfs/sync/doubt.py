"""When an absence is a deletion: the rule alone, state in and verdict out.

A leaf. FairOS-DFS says "not there" of whatever it cannot read just then, in the words in which it says
so of what was deleted. A lie of that kind hits things at random, many at once, and passes; a deletion
hits few, stays, and leaves its neighbours as they were. So an absence is asked about again and again,
over a growing time, and believed when it was confirmed each time beside neighbours that are present
and unchanged. Much that is missing at once is an alarm, which only the user settles, or its return:
what is cached of it may be the last copy. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

FEW = 3
"""So many missing objects of one folder are no alarm, whatever the folder's size."""
SHARE = 0.25
"""Of a folder's objects: more than this missing at once is an alarm."""
MUCH = 1000
"""Missing objects of one folder that are an alarm, whatever its size."""
ENOUGH = 2
"""Confirmations for one file among neighbours."""
MANY = 4
"""For a directory in which something is known, or where no neighbour bears witness."""
STUBBORN = 6
"""For a file that is shown in an earlier version: times of modification do not go back, but for a clock
that was wrong."""
DISTRUST_S = 600.0
"""For so long after the server was last caught saying "not there" of what was, nothing is believed."""
CAUTION_S = 45.0
"""For so long after that no pod is opened anew unasked: a server that cannot read the list of pods may
store it anew without some. Longer, and what it remembers wrongly would outlast its trouble."""
PAUSES_S = (0.0, 0.5, 1.0, 4.0, 16.0, 60.0, 240.0, 900.0)
"""Before the first, the second, … confirmation, and from then on: one that comes sooner is none."""


class Verdict(enum.Enum):
    DOUBTFUL = "doubtful"
    """Kept, and asked for again."""
    DELETED = "deleted"
    ALARM = "alarm"
    """Kept until the user accepts it, or it is back."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What one listing of a folder shows of what was known to be in it.

    ``missing`` of the ``known`` objects are not shown; ``unchanged`` are, just as they were. ``whole``:
    the server shows as many children as it says that the folder has. ``is_root``: the list of pods.
    """

    known: int
    missing: int
    unchanged: int
    whole: bool
    is_root: bool = False


@dataclass(frozen=True, slots=True)
class Absence:
    """One object that is not shown. ``holds``: a pod or directory in which something is known.

    ``confirmed``: how often it was found to be absent; ``last_s``: when last. ``outdated``: it is
    shown, but as it was before the version that is known.
    """

    holds: bool
    confirmed: int
    last_s: float | None = None
    outdated: bool = False

    def counts(self, now_s: float) -> bool:
        """Whether to find it absent now is another confirmation, or too soon to be one."""
        return self.last_s is None or now_s - self.last_s >= pause_s(self.confirmed)


def pause_s(confirmed: int) -> float:
    """How long to wait before something that was so often found to be absent is asked for again."""
    return PAUSES_S[min(confirmed, len(PAUSES_S) - 1)]


def is_much(folder: Folder) -> bool:
    """Whether so much is missing that no single object need be asked for."""
    if folder.is_root and folder.missing == folder.known:
        return folder.missing > 0  # an account does not lose its last pod in silence
    if folder.missing > MUCH:
        return True
    return folder.missing > FEW and folder.missing > SHARE * folder.known


def judge(folder: Folder, absence: Absence, lied_s: float | None, now_s: float) -> Verdict:
    """What an absence is by now. ``lied_s``: when the server was last caught, if ever."""
    alone = not folder.unchanged
    if is_much(folder) or (absence.holds and (folder.is_root or alone)):
        return Verdict.ALARM
    distrusted = lied_s is not None and now_s - lied_s < DISTRUST_S
    if distrusted or not folder.whole:
        return Verdict.DOUBTFUL
    needed = MANY if absence.holds or alone else ENOUGH
    if absence.outdated:
        needed = STUBBORN
    return Verdict.DOUBTFUL if absence.confirmed < needed else Verdict.DELETED
