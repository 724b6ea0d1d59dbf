"""The on-disk format of the cache's metadata, table by table and column by column.

A leaf module. There are two trees. ``inode`` is the *local* tree: what the kernel was last told.
``remote`` is the *remote* tree: what we believe the server holds. A remote row points to the inode
whose object it is. Writeback is whatever makes the second equal to the first; there is no log of
operations, so create + rename or create + delete cost nothing that the server need ever hear of.
"""

from __future__ import annotations

VERSION = 2
"""``PRAGMA user_version``. An older cache is brought to it (``MIGRATIONS``); a newer one is refused,
never guessed at."""

ROOT = 1
"""Inode and remote id of the mount's root, whose children are the pods."""

FILE, DIR, LINK = "f", "d", "l"

CONTENT, MODE, PLACE, SENT, DAMAGED = 1, 2, 4, 8, 16
"""Bits of ``inode.dirty``. CONTENT: the server has not got these bytes. MODE: nor these permission
bits. PLACE: nor the object under this name. SENT: an upload has begun and its outcome is not known,
so whatever the server now shows under this name may be ours. DAMAGED: the data file lost bytes that
had been acknowledged; it is kept as it is and never uploaded, until somebody writes it anew."""

UNKNOWN = -1
"""``remote.size`` of a file that is either the old version or the one that we sent."""

OUTDATED_S = 1.0
"""``inode.listed_s`` of a directory that was listed, and of which the next listing shows more."""

SCHEMA = f"""
CREATE TABLE inode (
    ino INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, so its FUSE generation is always 0
    parent INTEGER,            -- inode of the directory; NULL: the root, or unlinked and still open
    name TEXT,                 -- NULL exactly when parent is
    kind TEXT NOT NULL,        -- 'f' file, 'd' directory, 'l' symbolic link (kept here only)
    mode INTEGER NOT NULL,     -- permission bits (07777)
    size INTEGER NOT NULL,     -- bytes; of a dirty file: what was acknowledged. Its data file may
                               -- hold more, which was not; if it holds less, bytes were lost
    atime_ns INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    target TEXT,               -- of a symbolic link
    cached INTEGER NOT NULL,   -- file: 1 when the data file is complete
    dirty INTEGER NOT NULL,    -- what the server has not been told: bits
    listed_s REAL NOT NULL,    -- directory: Unix time of the last complete listing; 0: never
    used_s REAL NOT NULL,      -- file: Unix time of the last open, for eviction
    error TEXT,                -- why writeback last failed; NULL when it did not
    crc INTEGER,               -- file: CRC-32 of the content while it is clean; NULL: not known
    epoch INTEGER NOT NULL DEFAULT 0, -- file: ``state.epoch`` at which the data file was last right
    UNIQUE (parent, name)
);
CREATE INDEX inode_by_parent ON inode (parent, ino);
CREATE INDEX inode_cached ON inode (used_s, ino, size) WHERE cached = 1 AND dirty = 0;
CREATE INDEX inode_dirty ON inode (ino) WHERE dirty != 0;

CREATE TABLE xattr (
    ino INTEGER NOT NULL,
    name BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (ino, name)
) WITHOUT ROWID;

CREATE TABLE remote (
    rid INTEGER PRIMARY KEY AUTOINCREMENT,
    rparent INTEGER,           -- rid of the directory; NULL for the root only
    name TEXT NOT NULL,
    kind TEXT NOT NULL,        -- 'f' or 'd'
    size INTEGER NOT NULL,     -- bytes; UNKNOWN (-1): we overwrote it, and never heard if it worked
    mtime_s INTEGER,           -- Unix time of the server; NULL: not known, the next listing tells
    slack_s INTEGER NOT NULL,  -- how far `mtime_s` may be off: 0 when the server has told it
    mode INTEGER NOT NULL,     -- permission bits; UNKNOWN: a chmod was sent, and never answered
    readonly INTEGER NOT NULL, -- pod: 1 when received from somebody else
    ino INTEGER UNIQUE,        -- whose object this is; NULL: orphan, to be deleted at the server
    to_parent INTEGER,         -- a rename has been sent, its outcome is unknown: where it went
    to_name TEXT,
    absent_s REAL,             -- doubtful: Unix time since which the server does not show it. Of an
                               -- orphan: nothing need be done, unless it is shown again
    absences INTEGER NOT NULL DEFAULT 0, -- how often it was confirmed since that it is not there
    in_swarm INTEGER NOT NULL DEFAULT 1, -- file: 0 while only FairOS is known to have the content
    UNIQUE (rparent, name)
);
CREATE INDEX remote_moving ON remote (to_parent, to_name) WHERE to_parent IS NOT NULL;
CREATE INDEX remote_orphan ON remote (rid) WHERE ino IS NULL;
CREATE INDEX remote_doubtful ON remote (rid) WHERE absent_s IS NOT NULL;
CREATE INDEX remote_unswarmed ON remote (rid) WHERE in_swarm = 0;

CREATE TABLE sent (            -- uploads of which it is not known whether the server acted on them, or
    ino INTEGER NOT NULL,      -- still will: it goes on with a request whose client has died
    size INTEGER NOT NULL,     -- bytes
    crc INTEGER NOT NULL,      -- CRC-32 of them; UNKNOWN: not all of them had been read
    sent_s REAL NOT NULL,      -- Unix time of the server at the last byte; infinite: not known
    PRIMARY KEY (ino, size, crc)
) WITHOUT ROWID;

CREATE TABLE state (           -- what is true of the cache as a whole
    starts INTEGER NOT NULL,   -- how often it was opened
    epoch INTEGER NOT NULL,    -- the last of these that followed an unclean end
    ended INTEGER NOT NULL     -- 1 when the last driver closed the cache; 0 while one has it open
);

INSERT INTO inode VALUES ({ROOT}, NULL, NULL, 'd', 448, 0, 0, 0, 0, NULL, 0, 0, 0, 0, NULL, NULL, 0);
INSERT INTO remote VALUES
    ({ROOT}, NULL, '', 'd', 0, NULL, 0, 448, 0, {ROOT}, NULL, NULL, NULL, 0, 1);
INSERT INTO state VALUES (0, 0, 1);
PRAGMA user_version = {VERSION};
"""

MIGRATIONS = {
    1: """
ALTER TABLE inode ADD COLUMN crc INTEGER;
ALTER TABLE inode ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE remote ADD COLUMN absent_s REAL;
ALTER TABLE remote ADD COLUMN absences INTEGER NOT NULL DEFAULT 0;
ALTER TABLE remote ADD COLUMN in_swarm INTEGER NOT NULL DEFAULT 1;
CREATE INDEX remote_doubtful ON remote (rid) WHERE absent_s IS NOT NULL;
CREATE INDEX remote_unswarmed ON remote (rid) WHERE in_swarm = 0;
CREATE TABLE sent (
    ino INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL, sent_s REAL NOT NULL,
    PRIMARY KEY (ino, size, crc)
) WITHOUT ROWID;
CREATE TABLE state (
    starts INTEGER NOT NULL, epoch INTEGER NOT NULL, ended INTEGER NOT NULL
);
INSERT INTO state VALUES (1, 1, 1);
PRAGMA user_version = 2;
"""
}
"""By version: what makes the next one of it."""

AFTER_A_KILL = {
    1: f"""
UPDATE inode SET size = 0 WHERE dirty & {CONTENT};
UPDATE state SET ended = 0;
"""
}
"""What comes on top of it when the last driver was killed. Format 1 noted the size of a dirty file when
it was closed only, so it says nothing about what should be there."""
