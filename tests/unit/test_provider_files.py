"""Archives of a provider run: what goes out, what may come back, and what must not."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from cpodfs.runs import provider_files
from cpodfs.runs.provider_files import (
    BadArchive,
    NotThere,
    TaskLog,
    Unpacker,
    matching,
    pack,
    sha256_in,
    sha256_of,
)

Entry = tuple[str, bytes | None, dict[str, object]]


def archive(path: Path, entries: Iterable[Entry]) -> Path:
    """A tar archive of (name, content or None, attributes of the entry)."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, attributes in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            for key, value in attributes.items():
                setattr(member, key, value)
            tar.addfile(member, None if content is None else io.BytesIO(content))
    return path


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    pod = tmp_path / "pod"
    for folder in ("script", "payload/deep", "output"):
        (pod / folder).mkdir(parents=True)
    (pod / "script/run.sh").write_text("echo\n")
    (pod / "script/run.sh").chmod(0o755)
    (pod / "payload/deep/a").write_bytes(b"a")
    (pod / "payload/b").write_bytes(b"b")
    return pod


def test_what_is_sent(pod: Path, tmp_path: Path) -> None:
    (pod / "payload/link").symlink_to("/etc/passwd")
    os.mkfifo(pod / "payload/fifo")
    sent = pack(pod, ("script", "payload", "missing"), tmp_path / "t", frozenset({"payload/b"}))
    assert (sent.size, sent.sha256) == (sent.path.stat().st_size, sha256_of(sent.path))
    with tarfile.open(sent.path) as tar:
        names = {member.name: member for member in tar}
    assert set(names) == {
        *("script", "script/run.sh", "payload", "payload/deep", "payload/deep/a", "payload/link"),
    }
    assert names["script/run.sh"].mode & 0o100
    assert names["payload/link"].issym()
    assert names["script"].uname == ""


def test_matching_is_sorted_and_takes_regular_files_only(pod: Path) -> None:
    (pod / "payload/link").symlink_to(pod / "payload/b")
    (pod / "payload/c").write_bytes(b"")
    assert matching(pod, "payload/*") == ["payload/b", "payload/c"]
    assert matching(pod, "payload/**/a") == ["payload/deep/a"]


def test_results_arrive_and_grow(pod: Path, tmp_path: Path) -> None:
    unpacker = Unpacker(pod, "output")
    first = archive(
        tmp_path / "1",
        [
            ("output", None, {"type": tarfile.DIRTYPE}),
            ("./output/log", b"one\n", {"mode": 0o600}),
            ("output/new/deep/tool", b"#!", {"mode": 0o700}),
            ("output/empty", None, {"type": tarfile.DIRTYPE}),
        ],
    )
    assert unpacker.unpack(first) == {}
    assert (pod / "output/log").read_text() == "one\n"
    assert stat.S_IMODE((pod / "output/new/deep/tool").stat().st_mode) & 0o100
    assert (pod / "output/empty").is_dir()
    inode = (pod / "output/log").stat().st_ino
    with (pod / "output/log").open() as reader:
        assert reader.read() == "one\n"
        unpacker.unpack(archive(tmp_path / "2", [("output/log", b"one\ntwo\n", {})]))
        assert reader.read() == "two\n"
    unpacker.unpack(archive(tmp_path / "3", [("output/log", b"only", {})]))
    assert (pod / "output/log").read_text() == "only"
    assert (pod / "output/log").stat().st_ino == inode


def test_what_is_the_same_is_not_touched(pod: Path, tmp_path: Path) -> None:
    same = archive(tmp_path / "t", [("output/x", b"same", {})])
    unpacker = Unpacker(pod, "output")
    unpacker.unpack(same)
    os.utime(pod / "output/x", (1, 1))
    unpacker.unpack(same)
    assert (pod / "output/x").stat().st_mtime == 1


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("output/../script/run.sh", b"x", {}), "'..'"),
        (("/output/x", b"x", {}), "absolute"),
        (("script/run.sh", b"x", {}), "not in the output folder"),
        (("output", b"x", {}), "in place of the output folder"),
        (("outputs/x", b"x", {}), "not in the output folder"),
        (("output/l", None, {"type": tarfile.SYMTYPE, "linkname": "/etc"}), "not a regular file"),
        (("output/h", None, {"type": tarfile.LNKTYPE, "linkname": "script"}), "not a regular file"),
        (("output/f", None, {"type": tarfile.FIFOTYPE}), "not a regular file"),
        (("output/c", None, {"type": tarfile.CHRTYPE}), "not a regular file"),
        (("output/index.dfs", None, {"type": tarfile.SYMTYPE}), "not a regular file"),
        (("output/big", b"x" * 101, {}), "larger than a run may return"),
    ],
)
def test_what_is_refused(pod: Path, tmp_path: Path, entry: Entry, reason: str) -> None:
    before = (pod / "script/run.sh").read_text()
    with pytest.raises(BadArchive, match=reason):
        Unpacker(pod, "output", max_bytes=100).unpack(archive(tmp_path / "t", [entry]))
    assert (pod / "script/run.sh").read_text() == before
    assert list((pod / "output").rglob("*")) == []


@pytest.mark.parametrize(
    "name",
    [
        "a\u00a0b",
        "\U0001f468\u200d\U0001f469.txt",
        "e\u0301",
        " ",
        "-rf",
        "~",
        "x" * 255,
        "d" * 100 + "/x",
    ],
    ids=ascii,
)
def test_unusual_names_are_names(pod: Path, tmp_path: Path, name: str) -> None:
    entries: list[Entry] = [(f"output/{name}", b"x", {})]
    assert Unpacker(pod, "output").unpack(archive(tmp_path / "t", entries)) == {}
    assert (pod / "output" / name).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        ("a\nb", "'output/a\\nb'", "control characters"),
        ("x" * 256, f"'output/{'x' * 256}'", "longer than the 255 bytes"),
        ("caf\udce9", r"'output/caf\udce9'", "not UTF-8"),
        ("index.dfs", "'output/index.dfs'", "reserved"),
        ("é" * 51 + "/a", f"'output/{'é' * 51}/'", "longer than the 100 bytes"),
        (".cpodfs-x/y/z", "'output/.cpodfs-x/'", "cpodfs's own"),
        ("deep/" * 80 + "x", f"'output/{'deep/' * 64}'", "64 folders"),
        ("there/x", "'output/there/x'", "Not a directory"),
        ("folder", "'output/folder'", "Is a directory"),
        ("fifo", "'output/fifo'", "no regular file"),
    ],
)
def test_what_the_pod_cannot_hold_is_missing_and_the_rest_comes(
    pod: Path, tmp_path: Path, name: str, shown: str, reason: str
) -> None:
    (pod / "output/there").write_text("a file")
    (pod / "output/folder").mkdir()
    os.mkfifo(pod / "output/fifo")
    entries: list[Entry] = [("output/first", b"1", {}), (f"output/{name}", b"x", {})]
    if "/" in name:
        entries.append((f"output/{name}2", b"x", {}))
    missing = Unpacker(pod, "output").unpack(
        archive(tmp_path / "t", [*entries, ("output/last", b"2", {})])
    )
    assert next(iter(missing)) == shown
    assert reason in missing[shown]
    # Of a folder that cannot be, it is said once.
    assert len(missing) == (2 if name == "there/x" else 1)
    assert (pod / "output/first").read_bytes() == b"1"
    assert (pod / "output/last").read_bytes() == b"2"


def test_links_in_the_pod_are_not_followed(pod: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (pod / "output/d").symlink_to(outside)
    (pod / "output/f").symlink_to(outside / "f")
    for name in ("output/d/x", "output/f"):
        missing = Unpacker(pod, "output").unpack(archive(tmp_path / "t", [(name, b"x", {})]))
        assert list(missing) == [repr(name)]
    assert list(outside.iterdir()) == []


def test_a_pod_that_takes_nothing_is_not_the_entries_fault(
    pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    results = archive(tmp_path / "t", [("output/x", b"x", {})])
    monkeypatch.setattr(provider_files, "make_folder", refuse)
    with pytest.raises(OSError, match="Read-only"):
        Unpacker(pod, "output").unpack(results)


def test_a_pod_that_is_away_is_no_fault_of_the_archive(pod: Path, tmp_path: Path) -> None:
    results = archive(tmp_path / "t", [("output/x", b"x" * 60, {})])
    unpacker = Unpacker(pod, "output", max_bytes=100)
    pod.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            unpacker.unpack(results)
    (tmp_path / "away").rename(pod)
    assert unpacker.unpack(results) == {}
    assert (pod / "output/x").exists()


def test_a_file_that_comes_again_counts_once(pod: Path, tmp_path: Path) -> None:
    unpacker = Unpacker(pod, "output", max_bytes=100)
    for size in range(10, 101, 10):
        unpacker.unpack(archive(tmp_path / "t", [("output/grows", b"x" * size, {})]))
    with pytest.raises(BadArchive, match="larger than a run may return"):
        unpacker.unpack(archive(tmp_path / "t", [("output/other", b"x", {})]))


def test_no_archive_at_all(pod: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(os.urandom(5000))
    with pytest.raises(BadArchive, match="not a tar archive"):
        Unpacker(pod, "output").unpack(tmp_path / "t")


SPARSE = tarfile.TarInfo("output/sparse")
SPARSE.type = tarfile.GNUTYPE_SPARSE


@pytest.mark.parametrize(
    "header",
    [
        tarfile.TarInfo.create_pax_global_header({"a": "1" * 200_000}),
        tarfile.TarInfo._create_gnu_long_header("x" * 5000, tarfile.GNUTYPE_LONGNAME, "utf8", ""),
        tarfile.TarInfo._create_gnu_long_header("x", tarfile.GNUTYPE_LONGNAME, "utf8", "") * 3000,
        SPARSE.tobuf(tarfile.GNU_FORMAT),
    ],
    ids=["pax", "a long name", "many long names", "sparse"],
)
def test_headers_that_are_dear_to_read_are_refused(
    pod: Path, tmp_path: Path, header: bytes
) -> None:
    good = archive(tmp_path / "good", [("output/x", b"x", {})]).read_bytes()
    (tmp_path / "t").write_bytes(header + good)
    with pytest.raises(BadArchive):
        Unpacker(pod, "output").unpack(tmp_path / "t")


def test_what_a_link_leads_to_is_not_sent(pod: Path, tmp_path: Path) -> None:
    """A program in a sandbox can make the link; who packs is in none."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/key").write_text("secret")
    (pod / "output").mkdir(exist_ok=True)
    (pod / "output/l").symlink_to(home)
    for name in ("output/l/.ssh", "output/l"):
        with pytest.raises(OSError, match="a link, which is not followed: 'output/l'"):
            pack(pod, [name], tmp_path / "sent", frozenset())
    assert matching(pod, "output/*/.ssh/*") == []


def test_a_file_that_was_deleted(pod: Path) -> None:
    with pytest.raises(NotThere):
        sha256_in(pod, "payload/none")
    with pytest.raises(FileNotFoundError):
        sha256_in(pod / "away", "payload/none")


def test_a_task_log_is_appended_to(pod: Path) -> None:
    for text in (b"one\n", b"two\n"):
        TaskLog(pod, "logs/run", 7).append(text)
    assert (pod / "logs/run/tasks/7.log").read_bytes() == b"one\ntwo\n"


def test_no_file_may_fill_the_disk(tmp_path: Path) -> None:
    code = (
        "import errno, pathlib, shutil, sys\n"
        "from cpodfs.runs.provider import limit_files\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "limit_files(place)\n"
        "with (place / 'x').open('wb') as file:\n"
        "    file.truncate(1 << 20)\n"
        "    try:\n"
        "        file.truncate(shutil.disk_usage(place).free)\n"
        "    except OSError as error:\n"
        "        print(errno.errorcode[error.errno])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "EFBIG\n"
