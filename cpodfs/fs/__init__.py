"""The file system: POSIX semantics over the cache, and the kernel's edge of it."""
