"""httpx without its command line, to be imported from here.

httpx imports that where it can be had, with libraries that take a fifth of the time in which a mount
starts, and that nothing here needs. It says itself that it does without where it cannot.
"""

import sys

sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

import httpx  # noqa: E402 -- only now

__all__ = ["httpx"]
