"""Is everything there that mounting and running needs? One finding per question, each with its fix.

Imports the DFS client, the sandbox and mount-point rules; not the driver. Asks, and changes nothing
but this: whether there are funds is found out by setting a small amount aside and releasing it, as
yagna's API has no question for it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shutil
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

from cpodfs import fuse, mountpoint
from cpodfs.cache.content import RESERVE
from cpodfs.dfs import Client, Session, Timeouts
from cpodfs.errors import ConfigError, CpodfsError, LoginRefused, MountError, Unreachable
from cpodfs.runs import sandbox
from cpodfs.runs.payment import PLATFORMS_PATH, choose, lacks, platforms_in
from cpodfs.words import count, line, size

OK, WARN, BAD, UNKNOWN = "ok", "warn", "bad", "unknown"
ANSWER_S = 10.0
LITTLE_SPACE = 1 << 30
FUNDS_TRIED = "0.1"


@dataclass(frozen=True, slots=True)
class Finding:
    """``state``: ok; warn: works, but; bad: does not; unknown: could not be found out."""

    name: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be examined. ``password`` and ``app_key`` are None when nobody gave one,
    ``network`` and ``driver`` where the choice is ours; ``gsb_url``: where gftp looks for the daemon, None
    where that is the devnet's."""

    server: str
    user: str | None
    password: str | None
    cache: Path
    yagna_url: str
    app_key: str | None
    path: str
    network: str | None = None
    driver: str | None = None
    gsb_url: str | None = None
    sandbox: str = "auto"
    allow_other: bool = False


def examine(subject: Subject) -> list[Finding]:
    """All findings; takes some seconds at most when servers do not answer."""
    return [
        *_python(),
        *_fuse(allow_other=subject.allow_other),
        _sandbox(subject),
        _cache(subject.cache),
        *_kept(subject.cache),
        *trio.run(_store, subject),
        *_yagna(subject),
        _gftp(subject),
    ]


# -- this machine ---------------------------------------------------------------------------------


def _python() -> list[Finding]:
    findings = []
    fits = sys.version_info >= (3, 11)
    text = f"Python {platform.python_version()}"
    findings.append(
        Finding("python", OK if fits else BAD, text, "" if fits else "use 3.11 or later")
    )
    for module in ("pyfuse3", "yapapi"):
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with it is the finding
            text = f"cannot be imported: {type(error).__name__}: {error}"
            fix = f"{sys.executable} -m pip install --force-reinstall {module}"
            findings.append(Finding(module, BAD, text, fix))
        else:
            findings.append(Finding(module, OK, "can be imported"))
    return findings


def _fuse(*, allow_other: bool) -> list[Finding]:
    findings = [
        _settled(fuse.device(), str(fuse.DEVICE), "can be opened"),
        _settled(fuse.program(), "fusermount3", shutil.which("fusermount3") or ""),
    ]
    if allow_other:
        text = f"user_allow_other is in {fuse.CONFIGURATION}" if os.getuid() else "root may"
        findings.append(_settled(fuse.others(), "allow-other", text))
    return findings


def _settled(trouble: fuse.Trouble | None, name: str, otherwise: str) -> Finding:
    if trouble is None:
        return Finding(name, OK, otherwise)
    return Finding(name, BAD, trouble.text, trouble.fix)


def _sandbox(subject: Subject) -> Finding:
    if subject.sandbox == "off":
        return Finding("sandbox", OK, "not asked for")
    reason = sandbox.broken()
    if reason is None:
        return Finding("sandbox", OK, "bwrap works")
    state = BAD if subject.sandbox == "on" else WARN
    return Finding("sandbox", state, f"{reason}; pods of others run without", "see: man bwrap")


def _cache(folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding("cache", BAD, f"{there}: cannot be written to", "another --cache-dir")
    if there == folder and folder.stat().st_mode & 0o077:
        return Finding("cache", BAD, f"{folder}: others may look in", f"chmod 700 {folder}")
    if (folder / "unclaimed").is_dir() and any((folder / "unclaimed").iterdir()):
        text = f"{folder}: holds contents that no name belongs to"
        return Finding("cache", WARN, text, f"cpodfs cache check --folder {folder}")
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    text = f"{folder}: {size(free)} free"
    fix = "make room there, or another --cache-dir"
    if free < 2 * RESERVE:
        return Finding("cache", BAD, text, fix)
    return Finding("cache", WARN, text, fix) if free < LITTLE_SPACE else Finding("cache", OK, text)


def _kept(folder: Path) -> list[Finding]:
    """What the server does not show any more of what is in the cache. Nothing when that is not known:
    there is no cache, or its driver, which alone can look in it, does not answer."""
    doubtful = _doubtful_of_mount(folder)
    if doubtful is None:
        doubtful = _doubtful_of_cache(folder / "meta.db")
    if not doubtful:
        return []
    text = f"{count(doubtful, 'object')} not shown by the server any more; what is cached is kept"
    fix = "see: cpodfs status; if deleted elsewhere: cpodfs refresh --accept-deletions PATH"
    return [Finding("deletions", WARN, text, fix)]


def _doubtful_of_mount(folder: Path) -> int | None:
    for mount in mountpoint.own():
        try:
            if mountpoint.is_dead(mount):
                continue
            report = json.loads(os.getxattr(mount, "user.cpodfs.status"))
        except (OSError, MountError, ValueError):
            continue
        if report.get("cache") == str(folder):
            return int(report["doubtful_count"])
    return None


def _doubtful_of_cache(database: Path) -> int | None:
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db:
            query = "SELECT count(*) FROM remote WHERE absent_s IS NOT NULL AND ino IS NOT NULL"
            return int(db.execute(query).fetchone()[0])
    except (sqlite3.Error, ValueError):
        return None


# -- FairOS-DFS -----------------------------------------------------------------------------------


async def _store(subject: Subject) -> list[Finding]:
    user, password = subject.user, subject.password
    try:
        session = Session(
            *(subject.server, user or "nobody", lambda: password or ""),
            timeouts=Timeouts(metadata_s=ANSWER_S),
        )
        async with session:
            client = Client(session)
            known = await client.user_present(user or "nobody")
            server = Finding("server", OK, f"{subject.server} answers")
            return [server, await _account(client, subject, known=known)]
    except (Unreachable, ConfigError, ValueError) as error:
        fix = "is --server right, and FairOS-DFS running? To try without one: --devnet"
        text = f"{subject.server} does not answer: {error}"
    except CpodfsError as error:
        fix = "is that a FairOS-DFS server?"
        text = f"{subject.server}: {error}"
    unknown = Finding("account", UNKNOWN, "without a server nobody can tell")
    return [Finding("server", BAD, text, fix), unknown]


async def _account(client: Client, subject: Subject, *, known: bool) -> Finding:
    user = subject.user
    if user is None:
        return Finding("account", UNKNOWN, "whose?", "--user NAME, or CPODFS_USER")
    if not known:
        fix = "another --user, or sign up at the server"
        return Finding("account", BAD, f"{user}: no such user", fix)
    if subject.password is None:
        fix = "--password-file, --password-command or CPODFS_PASSWORD"
        return Finding("account", UNKNOWN, f"{user} exists; no password to try", fix)
    try:
        await client.login()
        await client.logout()
    except LoginRefused:
        text = f"{user}: the server refuses this password"
        return Finding("account", BAD, text, "give the right password")
    except CpodfsError as error:
        return Finding("account", BAD, f"{user}: {error}", "look at the server's log")
    return Finding("account", OK, f"{user} can log in")


# -- Golem ----------------------------------------------------------------------------------------


def _yagna(subject: Subject) -> list[Finding]:
    headers = {"Authorization": f"Bearer {subject.app_key}"} if subject.app_key else {}
    try:
        with httpx.Client(
            base_url=subject.yagna_url, headers=headers, timeout=ANSWER_S, trust_env=False
        ) as http:
            return _golem(http, subject)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        text = f"{subject.yagna_url} does not answer: {type(error).__name__}"
        fix = "start it: yagna service run; elsewhere: --yagna-url; to try without: --devnet"
        unknown = [Finding(name, UNKNOWN, "yagna would know") for name in ("app-key", "funds")]
        return [Finding("yagna", BAD, text, fix), *unknown]


def _golem(http: httpx.Client, subject: Subject) -> list[Finding]:
    answer = http.get("/me")
    yagna = Finding("yagna", OK, f"{subject.yagna_url} answers")
    no_funds = Finding("funds", UNKNOWN, "cannot be asked for without an app-key")
    fix = "yagna app-key create requestor; export YAGNA_APPKEY=… before mounting"
    if subject.app_key is None:
        return [yagna, Finding("app-key", BAD, "YAGNA_APPKEY is not set", fix), no_funds]
    if answer.status_code in (401, 403):
        return [yagna, Finding("app-key", BAD, "yagna refuses it", fix), no_funds]
    identity = _json(answer).get("identity") if isinstance(_json(answer), dict) else None
    if answer.status_code != 200 or not isinstance(identity, str):
        text = f"GET /me: {answer.status_code}, which is not what yagna says"
        return [Finding("yagna", BAD, text, "is --yagna-url right?"), no_funds]
    return [yagna, Finding("app-key", OK, f"is {identity}'s"), _funds(http, subject, identity)]


def _funds(http: httpx.Client, subject: Subject, identity: str) -> Finding:
    known = platforms_in(http.get(PLATFORMS_PATH))
    platform = choose(subject.network, subject.driver, known)
    if known is not None and (what := lacks(known, platform)) is not None:
        return Finding("funds", BAD, what, "another --network or --driver")
    wanted = f"{platform.driver} on {platform.network}"
    answer = http.get("/payment-api/v1/requestorAccounts")
    accounts = _json(answer)
    if answer.status_code != 200 or not isinstance(accounts, list):
        return _broken(f"requestorAccounts: {answer.status_code}{_said(answer)}")
    mine = [a for a in accounts if isinstance(a, dict) and a.get("platform") == str(platform)]
    order = {
        "totalAmount": FUNDS_TRIED,
        "paymentPlatform": str(platform),
        "address": mine[0].get("address") if mine else identity,
        "makeDeposit": False,
    }
    answer = http.post("/payment-api/v1/allocations", json=order)
    if answer.is_success:
        found = _json(answer)
        key = found.get("allocationId") if isinstance(found, dict) else None
        http.delete(f"/payment-api/v1/allocations/{key}")
        text = f"{FUNDS_TRIED} could be set aside, {wanted}"
        # After each start yagna has no account until somebody makes one or sets something aside.
        return Finding("funds", OK, text if mine else f"{text}, though yagna had no account yet")
    text = f"{FUNDS_TRIED} cannot be set aside, {wanted}: {answer.status_code}{_said(answer)}"
    if answer.status_code >= 500:
        return _broken(text, f"yagna payment init --sender --network {platform.network}")
    if answer.status_code in (400, 402, 403):
        return Finding("funds", BAD, text, f"yagna payment fund --network {platform.network}")
    return Finding("funds", UNKNOWN, text)


def _broken(text: str, fix: str = "") -> Finding:
    """What a daemon that works does not say, not even a fresh one."""
    return Finding("funds", BAD, text, " ; ".join(filter(None, (fix, "see yagna's log"))))


def _said(answer: httpx.Response) -> str:
    """yagna's own words: ``detail`` of a problem+json, else ``message``."""
    said = _json(answer)
    words = (
        [said.get(key) for key in ("detail", "parseError", "message")]
        if isinstance(said, dict)
        else []
    )
    return "".join(f" {line(word[:300])}" for word in words if isinstance(word, str) and word)


def _gftp(subject: Subject) -> Finding:
    program = shutil.which("gftp", path=subject.path)
    if program is None:
        fix = "it comes with yagna: put its folder (~/.local/bin) on PATH before mounting"
        return Finding("gftp", BAD, "is not on PATH", fix)
    kind, _, socket = (subject.gsb_url or "").partition(":")
    if kind == "unix" and not Path(socket).is_socket():
        text = f"{program}: would not find yagna: {socket} is not there"
        return Finding("gftp", WARN, text, "--gsb-url, or GSB_URL, as yagna was started with")
    return Finding("gftp", OK, program)


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None
