"""The local cache: two trees in SQLite and file contents beside them. Knows no FUSE, no network."""
