"""Who may speak to the development servers: programs of this machine, and web pages that they serve.

Imports nothing of ours. A web page of elsewhere can have the user's browser send requests here: it names itself in
``Origin``, or, after DNS rebinding, its own name in ``Host``. Another user of the machine can
connect as well, but does not have the control key, which is in a file of mode 0600.
"""

from __future__ import annotations

import hmac
import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


@web.middleware
async def local_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse (403) a ``Host`` that is not this machine, and pages of any other server.

    The port in ``Host`` may be another: that of a tunnel or a proxy that leads here.
    """
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    if len(request.headers.getall("Host", ())) != 1 or not _LOCAL_HOST.fullmatch(host):
        return _refusal(403, "this server is for this machine only: Host is not localhost")
    if origin is not None and origin.lower() != f"http://{host}".lower():
        return _refusal(403, "requests of web pages are refused: Origin is foreign")
    return await handler(request)


def controls_need_key(key: str, *paths: str) -> Middleware:
    """Refuse (401) what begins with one of ``paths`` without ``Authorization: Bearer <key>``.

    What changes something there must be ``application/json`` (415).
    """
    expected = f"Bearer {key}".encode()

    @web.middleware
    async def need_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith(paths):
            return await handler(request)
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, expected):
            return _refusal(401, "the control key is missing or wrong; it is in control.key")
        if request.method == "POST" and request.content_type != "application/json":
            return _refusal(415, "Content-Type is not application/json")
        return await handler(request)

    return need_key


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"message": f"devnet: {text}"}, status=status)
