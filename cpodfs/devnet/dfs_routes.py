"""How a JSON call is described, checked and answered: the same for every endpoint.

Imports the devnet's own modules. A ``Call`` says what the real server asks for and which refusals
get which status; ``answer`` does the checks in the real server's order (session, content type, JSON,
arguments). A handler only does the work: it returns the reply or raises ``Refusal``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_model import Refusal
from cpodfs.devnet.dfs_reads import Reads, readable_pods
from cpodfs.devnet.dfs_session import Session, Sessions, Unauthorized
from cpodfs.devnet.dfs_store import Pod, Store
from cpodfs.devnet.dfs_tree import Tree
from cpodfs.devnet.faults import NOTE, FaultBox, Handler, hang_up

SESSION_OR_POD = {m.NOT_LOGGED_IN: 400, m.POD_NOT_OPEN: 400}


@dataclass(frozen=True)
class Server:
    """What handlers work on."""

    store: Store
    sessions: Sessions
    box: FaultBox
    strict_open: bool

    def listed_pods(self, session: Session) -> list[Pod]:
        """The user's pods as the server reads their list now, to show it."""
        return readable_pods(self.box, self.store.pods(session.user.name)) or []

    def pods_to_work_on(self, session: Session) -> dict[str, Pod]:
        """The same by name, for all other purposes: a list that cannot be read is stored anew."""
        user = session.user.name
        pods = readable_pods(self.box, self.store.pods(user))
        if pods is None and self.box.faults.wipe_pods:
            self.store.keep_pods(user, set())
        return {pod.name: pod for pod in pods or ()}

    def add_to_pods(self, session: Session, name: str) -> None:
        """A new pod of that name will be listed; the list is stored as it was read.

        Raises Refusal when there is one.
        """
        user, known = session.user.name, self.pods_to_work_on(session)
        if name in known:
            raise Refusal(m.POD_EXISTS)
        if sum(not pod.shared for pod in known.values()) >= m.PODS_MAX - 1:
            raise Refusal(m.MAX_PODS)
        kept = {pod.name for pod in self.store.pods(user)} - {name}
        self.store.keep_pods(user, set(known) if self.box.faults.wipe_pods else kept)

    def open_pod(self, session: Session, name: str) -> Pod:
        """The pod, opened if need be. Raises Refusal."""
        if name in session.open_pods and not self.box.is_hidden(name):
            pod = self.store.pod(session.user.name, name)
            if pod is not None:
                return pod
        pod = self.pods_to_work_on(session).get(name)
        if pod is None:
            raise Refusal(m.POD_NOT_FOUND)
        session.open_pods.add(name)
        if not pod.shared and not self.tree(pod, session).has_dir("/"):
            raise Refusal(m.DIR_NOT_PRESENT)  # and yet it is open from now on
        return pod

    def pod_in_use(self, session: Session, name: str) -> Pod:
        """The pod for a call inside it. With strict_open also refuses one that is not open."""
        is_known = self.store.pod(session.user.name, name) is not None
        if self.strict_open and is_known and name not in session.open_pods:
            raise Refusal(m.POD_NOT_OPEN)
        return self.open_pod(session, name)

    def tree(self, pod: Pod, session: Session) -> Tree:
        """The pod's tree as far as the server can read it for this session."""
        return Tree(
            self.store,
            pod.address,
            writable=not pod.shared,
            rmdir_bug=self.box.faults.rmdir_bug,
            reads=Reads(self.box, session, pod),
        )


SERVER = web.AppKey("server", Server)


@dataclass(frozen=True)
class Call:
    """A request that passed the checks. ``args`` holds the arguments as text, '' when absent."""

    request: web.Request
    server: Server
    session_id: str
    args: Mapping[str, str]

    @property
    def session(self) -> Session:
        return self.server.sessions.need(self.session_id)

    def tree(self) -> Tree:
        """The tree of the pod that ``podName`` names."""
        session = self.session
        return self.server.tree(self.server.pod_in_use(session, self.args["podName"]), session)


Reply = dict[str, Any] | web.StreamResponse
Work = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True)
class Endpoint:
    """One route of the contract.

    ``needs``: arguments that must not be empty, with the text before each one's name when it is not
    the label. ``takes``: further ones. ``bare``: which refusals come as a string in the real
    server's code, hence with a ``code``: "" none, "args", "work" or "all". ``label`` precedes
    refusals, ``arg_label`` (the label, unless given) complaints about arguments.
    """

    method: str
    path: str
    label: str
    work: Work
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    statuses: Mapping[str, int] = field(default_factory=dict)
    default_status: int = 500
    success: int = 200
    bare: str = ""
    arg_label: str | None = None
    arg_labels: Mapping[str, str] = field(default_factory=dict)
    missing: str = "argument missing"
    in_query: bool = False
    public: bool = False
    plain_refusals: bool = False

    def complain(self, text: str, arg: str | None = None) -> web.Response:
        label = self.arg_labels.get(arg or "", self.arg_label or self.label)
        return message(f"{label}: {text}", 400, code=self.bare in ("args", "all"))

    def refuse(self, refusal: Refusal) -> web.Response:
        status = self.statuses.get(str(refusal), self.default_status)
        if str(refusal).startswith(m.BAD_REFERENCE):
            status = 400
        text = str(refusal) if self.plain_refusals else f"{self.label}: {refusal}"
        return message(text, status, code=self.bare in ("work", "all"))


def reply(
    payload: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":")) + "\n\n"
    return web.Response(
        body=text.encode("utf-8", "replace"),
        status=status,
        headers={"Content-Type": "application/json; charset=utf-8", **(headers or {})},
    )


def message(text: str, status: int, *, code: bool = False) -> web.Response:
    return reply({"message": text} | ({"code": status} if code else {}), status)


def handler_for(endpoint: Endpoint) -> Handler:
    """The aiohttp handler of ``endpoint``."""

    async def handle(request: web.Request) -> web.StreamResponse:
        server = request.app[SERVER]
        session_id = ""
        if not endpoint.public:
            try:
                if server.box.faults.reject_tokens:
                    raise Unauthorized("jwt: invalid token")
                session_id = server.sessions.authenticate(request)
            except Unauthorized as why:
                return message(str(why), 401)
        args = await _arguments(endpoint, request)
        if isinstance(args, web.Response):
            return args
        request[NOTE].pod, request[NOTE].target = args.get("podName"), _target(args)
        return await answer(endpoint, Call(request, server, session_id, args))

    return handle


async def answer(endpoint: Endpoint, call: Call) -> web.StreamResponse:
    """Do the work and put its outcome into the real server's words."""
    try:
        outcome = await endpoint.work(call)
    except m.Panic:
        return hang_up(call.request)
    except Refusal as refusal:
        return endpoint.refuse(refusal)
    if isinstance(outcome, web.StreamResponse):
        return outcome
    return reply(outcome, endpoint.success)


async def _arguments(endpoint: Endpoint, request: web.Request) -> dict[str, str] | web.Response:
    given: Mapping[str, Any] = request.query
    if not endpoint.in_query and (endpoint.needs or endpoint.takes):
        if request.headers.get("Content-Type") != "application/json":
            return endpoint.complain("invalid request body type")
        given_or_none = _decode(await request.read())
        if given_or_none is None:
            return endpoint.complain("could not decode arguments")
        given = given_or_none
    args: dict[str, str] = {}
    for name in endpoint.needs + endpoint.takes:
        value = given.get(name, "")
        if not isinstance(value, str):
            return endpoint.complain("could not decode arguments")
        if not value and name in endpoint.needs:
            return endpoint.complain(f'"{name}" {endpoint.missing}', name)
        args[name] = m.printable(value)
    return args


def _decode(body: bytes) -> dict[str, Any] | None:
    try:
        value, _ = json.JSONDecoder().raw_decode(body.decode("utf-8", "replace").lstrip())
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return {key: "" if item is None else item for key, item in value.items()}


def _target(args: Mapping[str, str]) -> str | None:
    for name in ("filePath", "dirPath", "oldPath"):
        if args.get(name):
            return args[name]
    return None
