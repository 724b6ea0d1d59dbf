"""Mutated inputs for all that reads what others wrote: ``python -m tests.bench.fuzz [INPUTS [SEED]]``.

By default 100,000, divided among the parsers. Each input is a valid one in which some bytes, or some
values of its JSON, were changed, doubled, moved or taken out. A parser may return or raise what it
documents; anything else, and more than ``LONGEST_S`` of processor time, is a finding: it is told with
the seed and the input, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpodfs.cli import follow
from cpodfs.cli.pods import Pod
from cpodfs.dfs import models
from cpodfs.errors import BadReply, NotTrusted, RecipeError
from cpodfs.fs.requests import Requests
from cpodfs.recipe import parse_recipe
from cpodfs.runs import debts, state
from cpodfs.runs.provider_files import BadArchive, Unpacker
from cpodfs.runs.provider_link import Link
from cpodfs.runs.provider_script import parse_answer
from cpodfs.runs.trust import TrustBook
from tests.bench.report import table

INPUTS = 100_000
LONGEST_S = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """``read`` returns, or raises one of ``documented``; ``seeds`` are valid inputs."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    documented: tuple[type[Exception], ...] = ()


# -- inputs -----------------------------------------------------------------------------------------

STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**63, 2**64, 10**30, float("nan"), float("inf"), [], {}, ""),
    *(
        "..",
        "a/b",
        "\0",
        "\x1b]8;;http://x\x07",
        "\ud800",
        "é" * 200,
        "9" * 5000,
        "1" * 19,
        "[" * 99,
    ),
    [[[[[[]]]]]],
    {"a": {"b": {"c": {}}}},
)
TOKENS = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"\\u0000", b"\\ud800", b"\xff"),
    *(
        b"-",
        b"1e999",
        b"NaN",
        b"\0" * 512,
        b"[" * 2000,
        b'{"a":' * 2000,
        b"9" * 5000,
        b"\n",
        b"ustar",
    ),
)


def mutated(dice: random.Random, seed: bytes) -> bytes:
    """One input: a few changes of its bytes, or of its values where it is JSON."""
    if dice.random() < 0.5:
        try:
            value = _changed(dice, json.loads(seed))
            return json.dumps(value).encode()
        except ValueError:
            pass
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice((1, 1, 2, 8, 100)))
        match dice.randrange(5):
            case 0:
                data[at:end] = dice.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = dice.choice(TOKENS)
            case 3:
                data[at:at] = data[at:end] * 3
            case _:
                del data[at:]
    return bytes(data)


def _changed(dice: random.Random, value: Any) -> Any:
    """The value with one of its parts replaced, doubled or taken out."""
    value = copy.deepcopy(value)
    inner = value
    while isinstance(inner, dict | list) and inner:
        key = dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if dice.random() < 0.4 or not isinstance(inner[key], dict | list):
            what = dice.random()
            if what < 0.7:
                inner[key] = dice.choice(STRANGE)
            elif what < 0.85:
                del inner[key]
            elif isinstance(inner, dict):
                inner[str(dice.choice(STRANGE))] = inner[key]
            else:
                inner += [inner[key]] * dice.choice((1, 50))
            return value
        inner = inner[key]
    return dice.choice(STRANGE)


# -- parsers ----------------------------------------------------------------------------------------


def _check_line(text: str) -> None:
    """What is said of an input is one line that can be shown."""
    assert text.isprintable(), text
    assert len(text) < 5000, text


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


ENTRY = {
    "name": "f",
    "contentType": "text/plain",
    "size": "5",
    "mode": 33188,
    "blockSize": "1000000",
    "creationTime": "1700000000",
    "modificationTime": "1700000000",
    "accessTime": "1700000000",
}
LISTING = _json({"dirs": [{"name": "d", "mode": 16832}], "files": [ENTRY, {**ENTRY, "name": "ü"}]})


def _listing(data: bytes) -> None:
    parser = models.ListingParser("/v1/dir/ls")
    for start in range(0, len(data), 1000):
        parser.feed(data[start : start + 1000])
    listing = parser.end()
    entries = list(listing)
    assert len(entries) == len(listing)
    for entry in entries:
        assert type(entry.name) is str
        assert type(entry.is_dir) is bool
        assert 0 <= entry.mode <= 0o7777
        for number in (entry.size, entry.mtime_s, entry.atime_s, entry.ctime_s):
            assert type(number) is int
            assert 0 <= number < 2**63


def _pods(data: bytes) -> None:
    parser = models.PodListParser("/v1/pod/ls")
    parser.feed(data)
    pods = parser.end()
    assert all(type(name) is str for name in (*pods.own, *pods.shared))


def _replies(data: bytes) -> None:
    """All the short replies: each must refuse what is not its own as BadReply."""
    for parse in (
        *(models.file_stat, models.dir_stat, models.pod_stat, models.file_status),
        *(models.share_info, models.file_share_info, models.access_token, models.upload_failure),
        *(models.present, models.pod_reference, models.file_reference, models.received_name),
    ):
        try:
            parse(data, "/v1")
        except BadReply as error:
            _check_line(str(error))
    models.error_message(data)


def _recipe(data: bytes) -> None:
    try:
        recipe = parse_recipe(data, file="a.recipe")
    except RecipeError as error:
        _check_line(str(error))
        raise
    json.dumps(recipe.raw, allow_nan=False)
    assert recipe.exec_argv


class Side:
    """What is read from files of the driver's, or of a run's folder in a pod."""

    def __init__(self, scratch: Path) -> None:
        self._pod = Pod(scratch, "side")
        self._folder = self._pod.path / "logs"
        self._folder.mkdir(parents=True)

    def record(self, data: bytes) -> None:
        (self._folder / state.RECORD_FILE).write_bytes(data)
        record = state.read_record(self._folder)
        if record is not None:
            state.encode(state.public(state.bounded(record)))
            debts.owes(record)
        shown = follow.read_record(self._pod, "logs")
        json.dumps(shown, allow_nan=False)

    def trust(self, data: bytes) -> None:
        path = self._folder / "trust.json"
        path.write_bytes(data)
        path.chmod(0o600)
        book = TrustBook(path)
        for pod in ("pod", "..", ""):
            digest = book.trusted(pod)
            assert digest is None or type(digest) is str
            book.is_own(pod)
            book.is_boxed(pod)


def _answer(data: bytes) -> None:
    """What a provider's script says of a program."""
    answer = parse_answer(data.decode(errors="replace"), 0, 3)
    assert answer.exit_code is None or 0 <= answer.exit_code <= 255
    assert min(answer.out_left, answer.err_left, answer.size) >= 0
    assert answer.archive is None or len(answer.archive) == answer.size
    assert bool(answer.sha256) == bool(answer.size)


class _Spool:
    """Takes what a stream gains."""

    def offer(self, data: bytes) -> None:
        assert type(data) is bytes


def _link(data: bytes) -> None:
    """The lines of the process that hires providers."""
    reader, writer = os.pipe()
    try:
        os.write(writer, data[:60_000])
        os.close(writer)
        spools: Any = {"stdout": _Spool(), "stderr": _Spool()}
        link = Link(reader, spools, lambda status: None)
        while link.pump() is not None:
            pass
        assert link.end is None or type(link.end) is dict
    finally:
        os.close(reader)


async def _carried_out(**_fields: Any) -> Any:
    raise NotTrusted("refused")


def _request(data: bytes) -> None:
    """The value of an attribute of the mount's root, as the commands set it."""
    nothing: Any = None
    requests = Requests(nothing, nothing, nothing, nothing, nothing, forgotten=nothing)
    requests._known = dict.fromkeys(requests._known, _carried_out)
    with contextlib.suppress(StopIteration):
        requests.ask(b"key", data).send(None)
    answer = requests.answer(b"key")
    if answer is not None:
        json.loads(answer)


class Archives:
    """Results as a provider sends them; whatever is in one, it stays in the output folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._archive = scratch / "results.tar"
        self._pod = scratch / "archives"

    def unpack(self, data: bytes) -> None:
        self._archive.write_bytes(data)
        (self._pod / "output").mkdir(parents=True, exist_ok=True)
        try:
            missing = Unpacker(self._pod, "output", max_bytes=2**20).unpack(self._archive)
            assert all(name.isprintable() for name in missing)
        except BadArchive as error:
            _check_line(str(error))
            raise
        finally:
            assert os.listdir(self._pod) == ["output"]
            assert set(os.listdir(self._scratch)) <= {"side", "archives", "results.tar"}
            shutil.rmtree(self._pod)


def _archive(*entries: tuple[str, bytes | None]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return made.getvalue()


RECIPE = {
    "name": "n",
    "description": "d",
    "version": "1.0",
    "author": "a",
    "public": False,
    "golem": {
        "exec": "sh script/run.sh 'a b'",
        "script": "script",
        "payload": "payload",
        "output": "output",
        "log": "logs",
        "runtime": {
            "image": "debian:12",
            "budget": 1.5,
            "timeout": "1h30m",
            "foreach": "payload/*.txt",
            "max_price": {"cpu_hour": 0.1},
        },
    },
}


def targets(scratch: Path) -> dict[str, Target]:
    """All parsers by name; those that need files make them in ``scratch``."""
    side, archives = Side(scratch), Archives(scratch)
    record = state.new_record("20260101T000000Z-abc123", "pod", ["sh", "-c", "true"], "logs/x")
    return {
        "listing": Target((LISTING,), _listing, (BadReply,)),
        "list of pods": Target(
            (_json({"pods": ["a", "b"], "sharedPods": None}),), _pods, (BadReply,)
        ),
        "short replies": Target(
            (
                _json({**ENTRY, "fileName": "f", "fileSize": "5", "filePath": "/", "dirName": "d"}),
                _json({"podName": "p", "address": "a", "accessToken": "t", "present": True}),
                _json({"Responses": [{"fileName": "f", "message": "uploaded successfully"}]}),
                _json({"podSharingReference": "r", "fileSharingReference": "r", "message": "m"}),
            ),
            _replies,
        ),
        "recipe": Target((_json(RECIPE),), _recipe, (RecipeError,)),
        "record of a run": Target((_json(record),), side.record),
        "record of trust": Target(
            (_json({"version": 1, "pods": {"pod": {"trusted": "a" * 64}, "..": {"own": True}}}),),
            side.trust,
        ),
        "provider's answer": Target(
            (
                b"cpodfs - 0 7 0 -\n",
                b"out 0 2 bYWI=\nerr 3 1 x0a\ncpodfs 0 0 0 3 " + b"a" * 64 + b" bYWJj\n",
            ),
            _answer,
            (ValueError,),
        ),
        "provider's lines": Target(
            (
                _json({"log": "stdout", "data": "c2FpZA=="}) + b"\n" + _json({"status": {"a": 1}}),
                _json({"end": {"error": None, "exit_code": 0}}),
            ),
            _link,
        ),
        "request": Target(
            (_json({"ask": "run", "pod": "p", "changes": {"a": "b"}}), _json({"ask": "share"})),
            _request,
        ),
        "archive": Target(
            (
                _archive(("output/a", b"a" * 600), ("output/d", None), ("output/d/b", b"b")),
                _archive(("output/" + "n" * 150, b"long"), ("output/é", b"")),
            ),
            archives.unpack,
            (BadArchive,),
        ),
    }


# -- the bench --------------------------------------------------------------------------------------


def fuzz(scratch: Path, inputs: int, seed: int) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Give each parser its share of the inputs. Returns how many each took and refused, and what
    was found."""
    counts, found = {}, []
    parsers = targets(scratch)
    for name, target in parsers.items():
        dice = random.Random(f"{seed} {name}")
        taken = refused = 0
        for number in range(-(-inputs // len(parsers))):
            data = mutated(dice, dice.choice(target.seeds)) if number else target.seeds[0]
            begun = time.process_time()
            try:
                target.read(data)
                taken += 1
            except target.documented:
                refused += 1
            except Exception:
                found.append(f"{name}, seed {seed}: {data[:2000]!r}\n{traceback.format_exc()}")
            if (took := time.process_time() - begun) > LONGEST_S:
                found.append(f"{name}, seed {seed}: {took:.1f} s for {data[:2000]!r}")
        counts[name] = (taken, refused)
    return counts, found


def main(inputs: int = INPUTS, seed: int | None = None) -> int:
    """Print what was found, and a table; returns the exit code."""
    seed = random.randrange(1 << 30) if seed is None else seed
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="cpodfs-fuzz-") as scratch:
        counts, found = fuzz(Path(scratch), inputs, seed)
    print(*found, sep="\n")
    rows = [(name, f"{taken:,}", f"{refused:,}") for name, (taken, refused) in counts.items()]
    print(f"seed {seed}\n{table(('parser', 'taken', 'refused'), rows)}\n{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
