"""Every exception that cpodfs raises on purpose, and the errno each one becomes at the kernel.

A leaf module: imports nothing of ours. The tree:

CpodfsError                     EIO
├── ConfigError                 EINVAL      a flag, variable or file that cannot be used
├── NameRefused                 EINVAL      a name that the store would refuse or that would do harm
│   └── NameTooLong             ENAMETOOLONG
├── RecipeError                 ENOEXEC     the pod's recipe is broken; names file and field
│   └── RecipeMissing           EOPNOTSUPP  the pod has no recipe, so it cannot be run
├── RunError                    EIO
│   ├── RunInProgress           EBUSY       one run per pod
│   ├── NotTrusted              EACCES      the code of somebody else, which nobody has vouched for
│   ├── Held                    EBUSY       a run's code, which stays as it is until the run has ended
│   └── NotNow                  EAGAIN      the machine is too busy to tell; trying again may help
├── CacheError                  EIO
│   ├── CacheDamaged            EIO         bytes that only the cache had are not there any more
│   ├── CacheLocked             EBUSY       another driver owns this cache
│   └── CacheVersion            EINVAL      written by a version of cpodfs that we do not know
├── MountError                  EIO         the mount point cannot be used
├── ChangedDuringUpload         EAGAIN      the file was written to while it was being sent
└── DfsError                    EIO         what the FairOS-DFS server said, or did not say
    ├── NotFound                ENOENT
    │   └── PodNotFound         ENOENT      so whatever was asked of what is in it was not looked for
    ├── Doubtful                EIO         the server does not show what it had: no proof of a deletion
    │   └── Unseen              EIO         it was renamed, and is shown at neither place yet
    ├── AlreadyExists           EEXIST
    ├── Conflict                ESTALE      the server's copy is not the one that we read
    ├── NotEmpty                ENOTEMPTY   a directory that still has children
    ├── NotLoggedIn             EACCES      the session is gone; logging in again may help
    │   ├── LoginRefused        EACCES      wrong password or no such user; trying again will not
    │   │   └── NoSuchUser      EACCES      or the server cannot read who there is
    │   └── LoginFailed         EIO         the server cannot log anybody in; it may pass
    ├── PodNotOpen              EIO         opening the pod again may help
    ├── Denied                  EACCES      the server will not, ever
    │   └── ReadOnlyPod         EROFS
    ├── Refused                 EINVAL      the request itself is at fault (name, size, form)
    │   └── TooLong             ENAMETOOLONG  a pod or directory name the server finds too long
    ├── QuotaExceeded           ENOSPC      too many pods, or no funds for storage
    ├── ServerError             EIO         5xx with no known meaning; may pass
    │   └── Overloaded          EIO         429 or 503: come back later
    ├── BadReply                EIO         not what the contract says: truncated, not JSON, …
    └── Unreachable             EHOSTUNREACH  nobody answers
        └── TimedOut            ETIMEDOUT   no answer in time; it may have been carried out
"""

from __future__ import annotations

import errno as _errno


class CpodfsError(Exception):
    """The root. ``errno`` is what the kernel is told; ``str()`` says what, where and what to do, in one
    line unless it has ``several_lines`` of ours."""

    errno: int = _errno.EIO
    several_lines = False


class ConfigError(CpodfsError):
    errno = _errno.EINVAL


class NameRefused(CpodfsError):
    errno = _errno.EINVAL


class NameTooLong(NameRefused):
    errno = _errno.ENAMETOOLONG


class RecipeError(CpodfsError):
    errno = _errno.ENOEXEC


class RecipeMissing(RecipeError):
    errno = _errno.EOPNOTSUPP


class RunError(CpodfsError):
    pass


class RunInProgress(RunError):
    errno = _errno.EBUSY


class NotTrusted(RunError):
    errno = _errno.EACCES


class Held(RunError):
    errno = _errno.EBUSY


class NotNow(RunError):
    errno = _errno.EAGAIN


class CacheError(CpodfsError):
    pass


class CacheDamaged(CacheError):
    pass


class CacheLocked(CacheError):
    errno = _errno.EBUSY


class CacheVersion(CacheError):
    errno = _errno.EINVAL


class MountError(CpodfsError):
    pass


class ChangedDuringUpload(CpodfsError):
    errno = _errno.EAGAIN


class DfsError(CpodfsError):
    """An answer of the server that is an error, or none at all.

    ``status`` is the HTTP status (``None`` when there was no answer), ``endpoint`` the path called.
    ``sent`` is False only when the request surely never reached the server. ``remedy``: what the
    user can do about a refusal that repeating will not mend; ``{path}`` is where it happened.
    ``retry_after_s``: no call is worth making before, whatever it is about, if that is known.
    ``half_done``: what was asked for takes several calls, and some of them had changed something.
    """

    remedy: str = ""
    retry_after_s: float | None = None
    half_done: bool = False

    def __init__(
        self, message: str, *, endpoint: str = "", status: int | None = None, sent: bool = True
    ) -> None:
        where = f"{endpoint}: " if endpoint else ""
        super().__init__(f"{where}{message}")
        self.message = message
        self.endpoint = endpoint
        self.status = status
        self.sent = sent


class NotFound(DfsError):
    errno = _errno.ENOENT


class PodNotFound(NotFound):
    pass


class Doubtful(DfsError):
    remedy = "if it was deleted elsewhere: cpodfs refresh --accept-deletions {path}"


class Unseen(Doubtful):
    pass


class AlreadyExists(DfsError):
    errno = _errno.EEXIST


class Conflict(DfsError):
    errno = _errno.ESTALE


class NotEmpty(DfsError):
    errno = _errno.ENOTEMPTY


class NotLoggedIn(DfsError):
    errno = _errno.EACCES


class LoginRefused(NotLoggedIn):
    pass


class NoSuchUser(LoginRefused):
    pass


class LoginFailed(NotLoggedIn):
    errno = _errno.EIO


class PodNotOpen(DfsError):
    pass


class Denied(DfsError):
    errno = _errno.EACCES
    remedy = "move it to a pod that you may write to: mv {path} …"


class ReadOnlyPod(Denied):
    errno = _errno.EROFS


class Refused(DfsError):
    errno = _errno.EINVAL
    remedy = "give it another name: mv {path} …"


class TooLong(Refused):
    errno = _errno.ENAMETOOLONG


class QuotaExceeded(DfsError):
    errno = _errno.ENOSPC
    remedy = "delete something or fund the account, then: cpodfs sync {path}"


class ServerError(DfsError):
    pass


class Overloaded(ServerError):
    pass


class BadReply(DfsError):
    pass


class Unreachable(DfsError):
    errno = _errno.EHOSTUNREACH


class TimedOut(Unreachable):
    errno = _errno.ETIMEDOUT
