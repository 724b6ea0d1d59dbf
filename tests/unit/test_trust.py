"""Whose code a pod's is; what may be changed for one run; which run folders are kept."""

from __future__ import annotations

import errno
import json
import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpodfs.errors import ConfigError, NotNow, NotTrusted, RecipeError
from cpodfs.recipe import parse_recipe
from cpodfs.runs import changes, keep, sandbox
from cpodfs.runs.provider_books import hired_for
from cpodfs.runs.provider_status import Status
from cpodfs.runs.trust import Fingerprint, TrustBook, Vouched

# -- the record -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "account.json"


def test_the_record_outlives_its_book(path: Path) -> None:
    book = TrustBook(path)
    book.own("mine")
    book.trust("theirs", "abc")
    again = TrustBook(path)
    assert again.is_own("mine")
    assert again.trusted("mine") is None
    assert again.trusted("theirs") == "abc"
    assert not again.is_own("theirs")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nobody_is_trusted_who_was_not_named(path: Path) -> None:
    book = TrustBook(path)
    assert not book.is_own("any")
    assert book.trusted("any") is None
    assert not book.forget("any")
    assert not path.exists()


def test_what_is_forgotten_stays_so(path: Path) -> None:
    book = TrustBook(path)
    book.own("mine")
    assert book.forget("mine")
    assert not TrustBook(path).is_own("mine")


def test_a_renamed_pod_keeps_what_is_known_of_it_and_a_new_one_inherits_nothing(path: Path) -> None:
    book = TrustBook(path)
    book.own("a")
    book.rename("a", "b")
    assert (book.is_own("a"), book.is_own("b")) == (False, True)
    book.rename("unknown", "b")
    assert not book.is_own("b")


def test_what_was_trusted_to_be_in_a_sandbox(path: Path) -> None:
    book = TrustBook(path)
    book.trust("bare", "abc")
    book.trust("boxed", "abc", boxed=True)
    again = TrustBook(path)
    assert (again.trusted("bare"), again.is_boxed("bare")) == ("abc", False)
    assert (again.trusted("boxed"), again.is_boxed("boxed")) == ("abc", True)
    again.trust("boxed", "abc")
    assert not TrustBook(path).is_boxed("boxed")
    assert not again.is_boxed("any")


def test_trust_in_a_program_for_providers_of_a_version_that_did_not_say_where(
    tmp_path: Path,
) -> None:
    path = tmp_path / "account.json"
    path.write_text('{"version": 1, "pods": {"old": {"trusted": "abc"}}}')
    path.chmod(0o600)
    book = TrustBook(path)
    assert not book.is_boxed("old")
    assert book.is_boxed("old", hires=True)
    book.trust("old", "abc")
    assert not TrustBook(path).is_boxed("old", hires=True)


def test_what_cannot_be_noted_is_forgotten_all_the_same(path: Path) -> None:
    book = TrustBook(path)
    book.own("mine")
    path.with_suffix(".new").mkdir()
    with pytest.raises(OSError):
        book.forget("mine")
    assert not book.is_own("mine")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 2, "pods": {"p": {"own": true}}}',
        '{"version": 1, "pods": ["p"]}',
        '{"version": 1, "pods": {"p": true}}',
        '{"version": 1, "pods": {"p": {"own": "yes", "trusted": 1}}}',
    ],
)
def test_a_broken_record_trusts_nobody(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    book = TrustBook(path)
    assert not book.is_own("p")
    assert book.trusted("p") is None
    book.own("p")
    assert TrustBook(path).is_own("p")


def test_a_record_that_others_can_write_is_no_record(path: Path) -> None:
    TrustBook(path).own("p")
    path.chmod(0o622)
    assert not TrustBook(path).is_own("p")


def test_a_record_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    book = TrustBook(tmp_path / "file" / "record")
    with pytest.raises(OSError):
        book.own("p")
    assert not book.is_own("p")


# -- what runs make of it -------------------------------------------------------------------------


def test_what_a_run_has_made_stands_as_the_run_left_it() -> None:
    seen = Vouched("abc", {"a": "1", "b": "1", "c": "1"})
    now = {"a": "2", "b": "2", "d": "1"}
    assert seen.changed(now) == ["a", "b", "c", "d"]
    after = seen.with_made(now, {"a", "c", "d"})
    assert after.changed(now) == ["b"]
    assert after.changed({"a": "3", "b": "1", "c": "2", "d": "2"}) == ["a", "c", "d"]
    assert after.changed(seen.files) == []
    # The next run is another one: what the first has made stands, what it makes itself is new.
    again = after.with_made({"b": "1", "d": "2", "e": "1"}, {"d"})
    assert again.made == {"c": None, "d": "2"}
    assert again.changed({"b": "1", "d": "2", "e": "1"}) == ["a", "e"]


def test_what_was_vouched_for_outlives_its_book(path: Path) -> None:
    book = TrustBook(path)
    assert book.vouched("theirs") is None
    book.note("theirs", Vouched("abc", {"a": "1"}, {"b": None}))
    assert book.vouched("theirs") is None
    book.trust("theirs", "abc")
    assert TrustBook(path).vouched("theirs") == Vouched("abc", {"a": "1"}, {"b": None})
    book.trust("theirs", "abd")
    assert book.vouched("theirs") is None
    (sheet,) = path.parent.glob("*/*.json")
    book.trust("theirs", "abc")
    for broken in ("", "[]", "{}", sheet.read_text().replace('"files": {', '"files": 1, "x": {')):
        sheet.write_text(broken)
        assert book.vouched("theirs") is None


# -- the hash -------------------------------------------------------------------------------------


def digest(*things: tuple[str, str, bytes, bool]) -> str:
    sheet = Fingerprint()
    for kind, path, content, executable in things:
        sheet.add(kind, path, content, executable=executable)
    return sheet.hexdigest()


def test_everything_counts_and_nothing_can_stand_for_something_else() -> None:
    base = ("file", "script/a", b"text", False)
    others = [
        (),
        (base, base),
        (("file", "script/b", b"text", False),),
        (("file", "script/a", b"texts", False),),
        (("file", "script/a", b"text", True),),
        (("link", "script/a", b"text", False),),
        (("file", "script/atext", b"", False),),
        (("file", "script/", b"atext", False),),
        (("file", "script/a", b"te", False), ("file", "xt", b"", False)),
        (("file", "script/a 4\n", b"text", False),),
    ]
    digests = {digest(base), *(digest(*other) for other in others)}
    assert len(digests) == len(others) + 1
    assert digest(base) == digest(base)


def test_not_trusted_is_eacces() -> None:
    assert NotTrusted("x").errno == errno.EACCES


# -- changes for one run --------------------------------------------------------------------------


def recipe(**golem: object):
    document = {"golem": {"exec": "a b", **golem}, "colour": "red"}
    return parse_recipe(json.dumps(document).encode(), file="x.recipe", others=["y.recipe"])


def test_no_change_is_no_change() -> None:
    before = recipe()
    assert changes.apply(before, {}) == (before, {})


def test_plain_names_reach_the_environment() -> None:
    before = recipe()
    after, env = changes.apply(before, {"frames": "10", "Big_1": "a=b c"})
    assert after == before
    assert env == {"CPODFS_SET_FRAMES": "10", "CPODFS_SET_BIG_1": "a=b c"}


def test_the_command_can_be_changed() -> None:
    before = recipe()
    after, env = changes.apply(before, {"golem.exec": "c 'd e'"})
    assert after.exec_argv == ("c", "d e")
    assert after.raw["golem"]["exec"] == "c 'd e'"
    assert (after.warnings, env) == (before.warnings, {})
    assert before.exec_argv == ("a", "b")
    assert before.raw["golem"]["exec"] == "a b"


def test_the_runtime_can_be_changed() -> None:
    before = recipe(runtime={"image": "x", "budget": 1.0, "max_price": {"start": 0}})
    wanted = {
        "golem.runtime.budget": "2.5",
        "golem.runtime.timeout": "30m",
        "golem.runtime.max_price.cpu_hour": "0.1",
    }
    raw = changes.apply(before, wanted)[0].raw["golem"]["runtime"]
    assert raw["budget"] == 2.5
    assert raw["timeout"] == "30m"
    assert raw["max_price"] == {"start": 0, "cpu_hour": 0.1}
    assert before.raw["golem"]["runtime"]["budget"] == 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("golem.output", "elsewhere"),
        ("golem.runtime", "{}"),
        ("golem.runtime.budget", "1"),
        ("a-b", "1"),
        ("", "1"),
        ("é", "1"),
        ("name", "a\0b"),
        ("name", "x" * 40000),
    ],
)
def test_what_cannot_be_changed(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        changes.apply(recipe(), {key: value})


def test_a_changed_recipe_is_checked_like_any_other() -> None:
    with pytest.raises(RecipeError, match=r"golem\.exec"):
        changes.apply(recipe(), {"golem.exec": "'"})
    with pytest.raises(ConfigError, match="at a provider no variable is set"):
        changes.apply(recipe(runtime={"image": "x", "budget": 1.0}), {"frames": "1"})
    with pytest.raises(ConfigError, match="no object"):
        changes.apply(
            recipe(runtime={"image": "x", "budget": 1.0}), {"golem.runtime.budget.x": "1"}
        )


# -- run folders that are kept --------------------------------------------------------------------


def run_folder(logs: Path, number: int) -> Path:
    folder = logs / f"20261124T05301{number}.123Z-ab12"
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "1.log").touch()
    (folder / "stdout.log").touch()
    return folder


def test_the_newest_folders_are_kept_and_nothing_else_goes(tmp_path: Path) -> None:
    logs = tmp_path / "a" / "logs"
    folders = [run_folder(logs, number) for number in range(5)]
    (logs / "notes").mkdir()
    (logs / "20261124").touch()
    keep.prune(str(tmp_path), f"a/logs/{folders[4].name}", 2, 10.0)
    assert sorted(logs.iterdir()) == sorted([*folders[3:], logs / "notes", logs / "20261124"])


def test_the_run_that_has_ended_stays_and_what_is_dated_in_the_future_goes_first() -> None:
    now = time.time()
    days = [-400, -2, -1, -0.5, 0.02, 3, 400]
    stamps = [time.strftime("%Y%m%dT%H%M%S", time.gmtime(now + day * 86400)) for day in days]
    old, *_, recent, ahead, wrong, made_up = names = [f"{stamp}.000Z-ab12" for stamp in stamps]
    assert keep.newest_first(names) == [*names[4::-1], made_up, wrong]
    # Another machine's, whose clock is a little ahead, may be in progress.
    assert set(names) - set(keep._too_many(names, recent, 2)) == {recent, ahead}
    for ended in (old, recent, made_up):
        assert ended not in keep._too_many(names, ended, 1)
        assert len(keep._too_many(names, ended, 1)) == 6
    assert keep._too_many(names, recent, 7) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    precious = run_folder(outside, 0)
    pod = tmp_path / "pod"
    pod.mkdir()
    (pod / "logs").symlink_to(outside)
    keep.prune(str(pod), "logs/x", 1, 10.0)
    (pod / "logs").unlink()
    last = run_folder(pod / "logs", 9)
    (pod / "logs" / precious.name).symlink_to(precious)
    keep.prune(str(pod), f"logs/{last.name}", 1, 10.0)
    assert (precious / "tasks" / "1.log").exists()
    assert last.exists()


def test_nothing_to_keep(tmp_path: Path) -> None:
    keep.prune(str(tmp_path), "logs/x", 1, 10.0)
    keep.prune(str(tmp_path / "gone"), "logs/x", 1, 10.0)
    assert list(tmp_path.iterdir()) == []


# -- what cannot be told, and who says what he is called ------------------------------------------


def test_a_probe_without_an_answer_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "bwrap"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sandbox, "PROBE_S", 0.1)
    with pytest.raises(NotNow, match=r"no answer in 0\.1 s; try again") as refusal:
        sandbox.never_works(str(slow))
    assert refusal.value.errno == errno.EAGAIN
    assert sandbox.broken(str(slow)) == str(refusal.value)


def test_a_machine_that_can_start_nothing_now_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_arguments: object, **_settings: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(sandbox.subprocess, "run", busy)
    with pytest.raises(NotNow, match="temporarily"):
        sandbox.never_works("/usr/bin/bwrap")


LINEAR = {
    "golem.com.scheme": "payu",
    "golem.com.pricing.model": "linear",
    "golem.com.pricing.model.linear.coeffs": [0.0, 0.0, 0.0],
    "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
}


def test_a_provider_cannot_write_lines_with_its_name() -> None:
    details = SimpleNamespace(
        provider_node_info=SimpleNamespace(name="zoé\rcpodfs: paid\n\x1b[2J" + "x" * 9000),
        raw_details=SimpleNamespace(offer=SimpleNamespace(provider_id="0x1")),
        provider_view=SimpleNamespace(properties=LINEAR),
    )
    status = Status(Decimal(1))
    hired = hired_for(status, SimpleNamespace(id="a", details=details))
    assert hired.name.startswith(r"zoé\rcpodfs: paid\n\x1b[2Jx")
    assert len(hired.name) < 120
