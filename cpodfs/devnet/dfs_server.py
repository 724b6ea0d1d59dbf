"""The FairOS-DFS-compatible application: routes, middleware and start-up put together.

Imports the devnet's own modules, which import only leaves. ``create_app`` is the contract that tests
and the command line build on. The application must be served on loopback only: it has no TLS.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from cpodfs.devnet import dfs_account, dfs_content, dfs_files, guard
from cpodfs.devnet import faults as fault_module
from cpodfs.devnet import request_log as log_module
from cpodfs.devnet.dfs_routes import SERVER, Server, handler_for
from cpodfs.devnet.dfs_session import Sessions
from cpodfs.devnet.dfs_store import Store
from cpodfs.devnet.faults import BOX, FaultBox, Faults, Handler
from cpodfs.devnet.request_log import LOG, RequestLog

TOKEN_LIFETIME_S = 24 * 3600.0


def create_app(
    state_dir: Path,
    faults: Faults | None = None,
    *,
    control_key: str,
    request_log: Path | None = None,
    token_lifetime_s: float = TOKEN_LIFETIME_S,
    strict_open: bool = False,
    open_signup: bool = False,
) -> web.Application:
    """A server over the state in ``state_dir``, which is created if missing.

    ``/devnet/…`` needs the ``control_key``, see `guard`; so does signing up, unless ``open_signup``.
    ``request_log`` gets a JSON line for each request. With ``strict_open`` a call on a pod that this
    session has not opened, or has closed, is refused ("pod not open") instead of opening it.
    """
    store = Store(state_dir)
    sessions = Sessions(token_lifetime_s)

    def use_store(empty: bool) -> None:
        if empty != store.is_empty_one:
            (store.use_empty_one if empty else store.use_full_one)()
            sessions.expire_all(tokens_too=True)

    box = FaultBox(
        faults or Faults(), lambda tokens: sessions.expire_all(tokens_too=tokens), use_store
    )
    guarded = ("/devnet/",) if open_signup else ("/devnet/", "/v2/user/signup")
    app = web.Application(
        middlewares=[
            guard.local_only,
            guard.controls_need_key(control_key, *guarded),
            log_module.middleware,
            _not_found,
            fault_module.middleware,
        ]
    )
    app[SERVER] = Server(store, sessions, box, strict_open)
    app[BOX] = box
    app[LOG] = RequestLog(request_log)
    for endpoint in dfs_account.ENDPOINTS + dfs_files.ENDPOINTS + dfs_content.ENDPOINTS:
        app.router.add_route(endpoint.method, endpoint.path, handler_for(endpoint))
    _add_control_routes(app)
    app.cleanup_ctx.append(_closing)
    return app


def _add_control_routes(app: web.Application) -> None:
    app.router.add_get("/devnet/faults", fault_module.show)
    app.router.add_post("/devnet/faults", fault_module.change)
    app.router.add_get("/devnet/stats", log_module.show)
    app.router.add_post("/devnet/stats/reset", log_module.reset)
    app.router.add_get("/", _alive)


async def _alive(_request: web.Request) -> web.Response:
    return web.Response(text="OK\n")


async def _closing(app: web.Application) -> AsyncIterator[None]:
    yield
    app[LOG].close()
    app[SERVER].store.close()


@web.middleware
async def _not_found(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The real server's router says 404 for a wrong method too."""
    try:
        return await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        return web.Response(text="404 page not found\n", status=404)
