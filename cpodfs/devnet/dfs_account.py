"""The endpoints about users and pods: signing up, logging in, opening, sharing, forking.

Imports the devnet's own modules. Statuses that look arbitrary are the real server's; in particular
logging out or deleting an unknown session is a 500 where most other calls say 400.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
from typing import Any

from aiohttp import web

from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_model import Refusal
from cpodfs.devnet.dfs_record import Content
from cpodfs.devnet.dfs_routes import SESSION_OR_POD, Call, Endpoint, Reply, Server
from cpodfs.devnet.dfs_routes import reply as json_reply
from cpodfs.devnet.dfs_session import COOKIE, Session
from cpodfs.devnet.dfs_store import Pod, Store, User, scrypt
from cpodfs.devnet.dfs_tree import Tree
from cpodfs.devnet.faults import retry_header

_SYLLABLES = "ba be bi bo da de di do fa fe fi fo ga ge gi go ka ke ki ko la le li lo ma me mi mo"

_REJECTED_TOKEN = "devnet.rejected.token"  # noqa: S105 - opens nothing


async def add_user(store: Store, name: str, password: str, mnemonic: str = "") -> tuple[User, str]:
    """Create an account; returns it with its mnemonic. Raises Refusal with the server's text."""
    if len(password.encode()) < m.PASSWORD_MIN:
        raise Refusal("password should be at least 12 characters long")
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise Refusal("invalid user name")
    words = mnemonic or _new_mnemonic()
    address = "0x" + hashlib.sha256(words.encode()).hexdigest()[:40]
    salt = secrets.token_bytes(16)
    digest = await asyncio.to_thread(scrypt, password, salt)
    known = store.user(name)
    if known is not None and known.address != address:
        raise Refusal("user name already present")
    return store.put_user(name, address, salt, digest), words


def _new_mnemonic() -> str:
    syllables = _SYLLABLES.split()
    return " ".join("".join(secrets.choice(syllables) for _ in range(3)) for _ in range(12))


async def _signup(call: Call) -> Reply:
    args = call.args
    user, words = await add_user(
        call.server.store, args["userName"], args["password"], args["mnemonic"]
    )
    shown = {} if args["mnemonic"] else {"mnemonic": words}
    return _welcome(call, user, "user signed-up successfully", 201, shown)


async def _login(call: Call) -> Reply:
    store, name = call.server.store, call.args["userName"]
    if call.server.box.refuses_login():
        status = call.server.box.faults.login_status
        headers = retry_header(call.request, status)
        return json_reply({"message": "user login: invalid password"}, status, headers)
    user = store.user(name)
    if user is None:
        raise Refusal("no user available")
    if not await _is_password(store, name, call.args["password"]):
        raise Refusal("invalid password")
    return _welcome(call, user, "user logged-in successfully", 200, {})


async def _is_password(store: Store, name: str, password: str) -> bool:
    salt, digest = store.password_of(name)
    if digest is None:
        return False
    return secrets.compare_digest(await asyncio.to_thread(scrypt, password, salt), digest)


def _welcome(
    call: Call, user: User, text: str, status: int, more: dict[str, str]
) -> web.StreamResponse:
    session = call.server.sessions.new(user)
    body = {
        "address": user.address,
        "nameHash": "0x",
        "publicKey": user.public_key,
        "message": text,
        **more,
        "accessToken": _REJECTED_TOKEN
        if call.server.box.faults.reject_tokens
        else call.server.sessions.token(session),
    }
    response = json_reply(body, status)
    call.server.sessions.set_cookie(response, session)
    return response


async def _user_present(call: Call) -> Reply:
    return {"present": call.server.store.user(call.args["userName"]) is not None}


async def _is_logged_in(call: Call) -> Reply:
    return {"loggedin": call.server.sessions.is_logged_in(call.args["userName"])}


async def _user_stat(call: Call) -> Reply:
    user = call.session.user
    return {"userName": user.name, "address": user.address}


async def _logout(call: Call) -> Reply:
    call.server.sessions.drop(call.session.id)
    return _goodbye("user logged out successfully")


async def _user_delete(call: Call) -> Reply:
    session, store = call.session, call.server.store
    if not await _is_password(store, session.user.name, call.args["password"]):
        raise Refusal("error downloading data")
    store.forget_password(session.user.name)
    call.server.sessions.drop(session.id)
    return _goodbye("user deleted successfully")


def _goodbye(text: str) -> web.Response:
    response = json_reply({"message": text})
    response.del_cookie(COOKIE, path="/")
    return response


async def _pod_new(call: Call) -> Reply:
    given = call.args["podName"]
    pod = new_pod(call.server, call.session, given)
    if pod.name != given:
        raise Refusal(m.POD_NOT_FOUND)  # the real server looks for the untrimmed name afterwards
    return {"message": "pod created successfully"}


def new_pod(server: Server, session: Session, given: str) -> Pod:
    """Create and open a pod. Raises Refusal."""
    if len(given.encode()) > m.POD_NAME_MAX:
        raise Refusal(m.POD_NAME_TOO_LONG)
    name = given.strip()
    server.add_to_pods(session, name)
    session.open_pods.add(name)
    return server.store.new_pod(session.user.name, name)


async def _pod_open(call: Call) -> Reply:
    call.server.open_pod(call.session, call.args["podName"])
    return {"message": "pod opened successfully"}


async def _pod_close(call: Call) -> Reply:
    session, name = call.session, call.args["podName"]
    if name not in session.open_pods:
        raise Refusal(f"could not find pod: {name}")
    session.open_pods.discard(name)
    pod = call.server.store.pod(session.user.name, name)
    if pod is not None:
        session.forget(pod.address)
    return {"message": "pod closed successfully"}


async def _pod_sync(call: Call) -> Reply:
    name = call.args["podName"]
    if len(name.encode()) > m.POD_NAME_MAX:
        raise Refusal(m.POD_NAME_TOO_LONG)
    call.server.open_pod(call.session, name.strip())
    return {"message": "pod synced successfully"}


async def _pod_delete(call: Call) -> Reply:
    session, server = call.session, call.server
    pod = server.open_pod(session, call.args["podName"])
    if not pod.shared:
        server.tree(pod, session).empty_root()
    server.store.drop_pod(session.user.name, pod)
    session.open_pods.discard(pod.name)
    return {"message": "pod deleted successfully"}


async def _pod_ls(call: Call) -> Reply:
    pods = call.server.listed_pods(call.session)
    return {
        "pods": [pod.name for pod in pods if not pod.shared],
        "sharedPods": [pod.name for pod in pods if pod.shared],
    }


async def _pod_stat(call: Call) -> Reply:
    pod = call.server.open_pod(call.session, call.args["podName"])
    return {"podName": pod.name, "address": pod.address}


async def _pod_present(call: Call) -> Reply:
    try:
        session = call.session
    except Refusal:
        return {"present": False}
    return {"present": call.args["podName"].strip() in call.server.pods_to_work_on(session)}


async def _pod_share(call: Call) -> Reply:
    user, args = call.session.user, call.args
    pod = call.server.pods_to_work_on(call.session).get(args["podName"])
    if pod is None or pod.shared:
        raise Refusal(m.POD_NOT_FOUND)
    body = {
        "podName": args["sharedPodName"] or pod.name,
        "podAddress": pod.address,
        "password": pod.password,
        "userAddress": user.address.removeprefix("0x"),
    }
    return {"podSharingReference": call.server.store.new_share("pod", body)}


def share_of(call: Call) -> dict[str, Any]:
    """What a pod's sharing reference leads to. Raises Refusal."""
    reference = call.args["sharingRef"]
    for letter in reference:
        if letter not in "0123456789abcdefABCDEF":
            where = f"invalid byte: U+{ord(letter):04X} '{letter}'"
            raise Refusal(f"{m.BAD_REFERENCE}encoding/hex: {where}")
    return call.server.store.share("pod", reference)


async def _pod_receive_info(call: Call) -> Reply:
    _ = call.session
    return share_of(call)


async def _pod_receive(call: Call) -> Reply:
    session = call.session
    body = share_of(call)
    asked = call.args["sharedPodName"]
    name = asked if len(asked.encode()) == 1 else body["podName"]
    call.server.add_to_pods(session, name)
    pod = Pod(name, body["podAddress"], body["password"], shared=True)
    call.server.store.add_shared_pod(session.user.name, pod)
    session.open_pods.add(name)
    quoted = json.dumps(name, ensure_ascii=False)
    return {"message": f"public pod {quoted}, added as shared pod"}


async def _pod_fork(call: Call) -> Reply:
    session, server = call.session, call.server
    target = _fork_target(call, session)
    source = server.open_pod(session, call.args["podName"].strip())
    _clone(server.tree(source, session), server.tree(target, session), "/")
    return {"message": "pod forked successfully"}


async def _pod_fork_from_reference(call: Call) -> Reply:
    session, reference = call.session, call.args["podSharingReference"]
    if not reference:
        raise Refusal("pod sharing reference cannot be blank")
    if not call.args["forkName"]:
        raise Refusal("pod name cannot be blank")
    target = _fork_target(call, session)
    if re.fullmatch(r"([0-9a-fA-F]{2})+", reference):
        body = call.server.store.share("pod", reference)
        source = Tree(call.server.store, body["podAddress"], writable=False)
        _clone(source, call.server.tree(target, session), "/")
    return {"message": "pod forked successfully"}


def _fork_target(call: Call, session: Session) -> Pod:
    name = call.args["forkName"]
    if name.strip() in call.server.pods_to_work_on(session):
        raise Refusal("pod with fork name already exists")
    return new_pod(call.server, session, name)


def _clone(source: Tree, target: Tree, path: str) -> None:
    if not source.has_dir(path):
        raise Refusal(m.DIR_NOT_PRESENT)
    for kind, name in source.entries(path):
        child = m.join(path, name)
        if kind == "D":
            target.mkdir(child)
            _clone(source, target, child)
        else:
            old = source.need_file(child)
            content = Content(old.blob, old.size, old.content_type)
            block, packing = old.block_size, old.compression
            target.put_file(path, name, content, block=block, compression=packing, overwrite=True)


_POD = ("podName",)
_POD_MISSING = SESSION_OR_POD | {m.POD_NOT_FOUND: 400}
_NEW_POD = _POD_MISSING | {m.POD_NAME_TOO_LONG: 400, m.POD_EXISTS: 400, m.MAX_PODS: 400}
_SIGNUP = {"user name already present": 400}
_LOGIN = {"no user available": 404, "invalid password": 400}
_OPEN = {m.NOT_LOGGED_IN: 404, m.POD_NOT_FOUND: 404}
_SYNC = _POD_MISSING | {m.POD_NAME_TOO_LONG: 400}
_DELETE_ARG = "parameter missing in cookie"

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v2/user/signup",
        "user signup",
        _signup,
        needs=("userName", "password"),
        takes=("mnemonic",),
        statuses=_SIGNUP,
        success=201,
        public=True,
    ),
    Endpoint(
        "POST",
        "/v2/user/login",
        "user login",
        _login,
        needs=("userName", "password"),
        statuses=_LOGIN,
        public=True,
    ),
    Endpoint(
        "GET",
        "/v2/user/present",
        "user present",
        _user_present,
        needs=("userName",),
        in_query=True,
        public=True,
    ),
    Endpoint(
        "GET",
        "/v1/user/isloggedin",
        "user isloggedin",
        _is_logged_in,
        needs=("userName",),
        in_query=True,
        public=True,
    ),
    Endpoint("GET", "/v1/user/stat", "user stat", _user_stat, in_query=True),
    Endpoint("POST", "/v1/user/logout", "user logout", _logout),
    Endpoint(
        "DELETE",
        "/v2/user/delete",
        "user delete",
        _user_delete,
        needs=("password",),
        bare="args",
    ),
    Endpoint(
        "POST", "/v1/pod/new", "pod new", _pod_new, needs=_POD, statuses=_NEW_POD, success=201
    ),
    Endpoint("POST", "/v1/pod/open", "pod open", _pod_open, needs=_POD, statuses=_OPEN),
    Endpoint("POST", "/v1/pod/close", "pod close", _pod_close, needs=_POD, statuses=SESSION_OR_POD),
    Endpoint("POST", "/v1/pod/sync", "pod sync", _pod_sync, needs=_POD, statuses=_SYNC),
    Endpoint(
        "DELETE",
        "/v1/pod/delete",
        "delete pod",
        _pod_delete,
        needs=_POD,
        statuses={m.NOT_LOGGED_IN: 400},
        arg_label="pod delete",
        missing=_DELETE_ARG,
    ),
    Endpoint("GET", "/v1/pod/ls", "ls pod", _pod_ls, statuses=SESSION_OR_POD, in_query=True),
    Endpoint(
        "GET",
        "/v1/pod/stat",
        "pod stat",
        _pod_stat,
        needs=_POD,
        statuses=SESSION_OR_POD,
        in_query=True,
    ),
    Endpoint("GET", "/v1/pod/present", "doc ls", _pod_present, needs=_POD, in_query=True),
    Endpoint(
        "POST",
        "/v1/pod/share",
        "pod share",
        _pod_share,
        needs=_POD,
        takes=("sharedPodName",),
        statuses=_POD_MISSING,
    ),
    Endpoint(
        "GET",
        "/v1/pod/receiveinfo",
        "pod receive info",
        _pod_receive_info,
        needs=("sharingRef",),
        bare="all",
        in_query=True,
    ),
    Endpoint(
        "GET",
        "/v1/pod/receive",
        "pod receive",
        _pod_receive,
        needs=("sharingRef",),
        takes=("sharedPodName",),
        bare="all",
        in_query=True,
    ),
    Endpoint(
        "POST",
        "/v1/pod/fork",
        "pod fork",
        _pod_fork,
        needs=("podName", "forkName"),
        statuses=_POD_MISSING,
    ),
    Endpoint(
        "POST",
        "/v1/pod/fork-from-reference",
        "pod fork",
        _pod_fork_from_reference,
        takes=("forkName", "podSharingReference"),
        statuses=_POD_MISSING,
    ),
)
