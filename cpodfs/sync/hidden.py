"""Names of the server's that cannot be shown: each is logged once, and not at each listing. Leaf."""

from __future__ import annotations

import logging
from collections import OrderedDict

log = logging.getLogger(__name__)

NAMES = 10
"""Logged of one folder; a server may have millions."""
FOLDERS = 1000
LOGGED_CHARS = 255


class Hidden:
    """Names are remembered by their hashes: they may be long."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, set[int]] = OrderedDict()

    def note(self, directory: int, name: str, path: str) -> None:
        """A listing of the directory (an inode's number) at ``path`` has ``name``."""
        known = self._known.setdefault(directory, set())
        self._known.move_to_end(directory)
        if len(self._known) > FOLDERS:
            self._known.popitem(last=False)
        if hash(name) in known or len(known) == NAMES:
            return
        known.add(hash(name))
        more = "; more in there are not logged" if len(known) == NAMES else ""
        log.warning("hidden: unusable name %r in %s%s", name[:LOGGED_CHARS], path, more)
