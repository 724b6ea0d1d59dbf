"""Whose code a pod's is; what may be changed for one run; which run folders are kept."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from cpodfs.errors import ConfigError, NotTrusted, RecipeError
from cpodfs.recipe import parse_recipe
from cpodfs.runs import changes, keep, sandbox
from cpodfs.runs.trust import Fingerprint, TrustBook

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
    keep.prune(str(tmp_path), "a/logs", 2, 10.0)
    assert sorted(logs.iterdir()) == sorted([*folders[3:], logs / "notes", logs / "20261124"])


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    precious = run_folder(outside, 0)
    pod = tmp_path / "pod"
    pod.mkdir()
    (pod / "logs").symlink_to(outside)
    keep.prune(str(pod), "logs", 1, 10.0)
    (pod / "logs").unlink()
    last = run_folder(pod / "logs", 9)
    (pod / "logs" / precious.name).symlink_to(precious)
    keep.prune(str(pod), "logs", 1, 10.0)
    assert (precious / "tasks" / "1.log").exists()
    assert last.exists()


def test_nothing_to_keep(tmp_path: Path) -> None:
    keep.prune(str(tmp_path), "logs", 1, 10.0)
    keep.prune(str(tmp_path / "gone"), "logs", 1, 10.0)
    assert list(tmp_path.iterdir()) == []


# -- the sandbox ----------------------------------------------------------------------------------


def test_a_bwrap_that_does_not_work(tmp_path: Path) -> None:
    assert "does not work here" in (sandbox.broken("/bin/false") or "")
    assert "does not work here: FileNotFoundError" in (sandbox.broken(str(tmp_path / "no")) or "")


def test_without_bwrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert sandbox.program() is None
    assert "apt install bubblewrap" in (sandbox.broken() or "")


def test_secrets_are_not_among_the_arguments(tmp_path: Path) -> None:
    env = {"YAGNA_APPKEY": "secret-key", "PATH": "/usr/bin"}
    words = sandbox.wrapper("bwrap", tmp_path / "pods" / "pod", env)
    assert not any("secret-key" in word or "YAGNA" in word for word in words)
    assert sandbox.environment(env)["YAGNA_APPKEY"] == "secret-key"
