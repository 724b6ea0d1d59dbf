"""Names, configuration and the mount table: pure functions, hostile input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpodfs import config, mountpoint, paths
from cpodfs.cli import control
from cpodfs.cli.control import tell
from cpodfs.cli.pods import request
from cpodfs.errors import ConfigError, MountError, NameRefused, NameTooLong


@pytest.mark.parametrize("name", ["a", "ü" * 127, "with space", "-dash", "q\"uo'te", "a" * 255])
def test_names_that_files_may_have(name: str) -> None:
    paths.check_file_name(name)
    assert paths.is_safe_remote_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "index.dfs", "a\nb", "\x7f", "nul\0"])
def test_names_that_nothing_may_have(name: str) -> None:
    for check in (paths.check_file_name, paths.check_dir_name):
        with pytest.raises(NameRefused):
            check(name)


def test_limits_are_in_bytes() -> None:
    with pytest.raises(NameTooLong):
        paths.check_file_name("ü" * 128)
    with pytest.raises(NameTooLong):
        paths.check_dir_name("d" * 101)
    with pytest.raises(NameTooLong):
        paths.check_pod_name("p" * 65)
    with pytest.raises(NameRefused):
        paths.check_pod_name(" padded")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "nul\0", "\ud800", "x" * 256])
def test_names_from_the_server_that_are_hidden(name: str) -> None:
    assert not paths.is_safe_remote_name(name)


def test_undecodable_names_are_refused() -> None:
    with pytest.raises(NameRefused):
        paths.decode_name(b"\xff")
    assert paths.decode_name("ü".encode()) == "ü"


def test_cache_folders_differ_and_stay_inside(tmp_path: Path) -> None:
    folders = {
        config.account_cache(tmp_path, server, user)
        for server in ("http://a:1", "http://b:1", "http://a:1/..")
        for user in ("x", "../../etc", "x/y", "x" * 500)
    }
    assert len(folders) == 12
    assert {folder.parent for folder in folders} == {tmp_path}
    same = config.account_cache(tmp_path, "http://a:1/", "x")
    assert same == config.account_cache(tmp_path, "http://a:1", "x")


def test_password_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret word\nsecond line\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        config.read_password_file(path)
    path.chmod(0o600)
    assert config.read_password_file(path) == "secret word"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        config.read_password_file(path)
    with pytest.raises(ConfigError, match="missing"):
        config.read_password_file(tmp_path / "missing")


def test_password_command_shows_no_output() -> None:
    assert config.run_password_command("printf 'a b\\nrest'") == "a b"
    with pytest.raises(ConfigError) as caught:
        config.run_password_command("sh -c 'echo hidden; exit 1'")
    assert "hidden" not in str(caught.value).replace("'echo hidden; exit 1'", "")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", "is empty"),
        ("unbalanced '", "cannot be split into words: no closing quotation"),
        ("/nonexistent x", "/nonexistent: No such file or directory"),
        ("/etc/passwd", "/etc/passwd: Permission denied"),
        ("true", "printed nothing"),
        ("sh -c 'exit 42'", "ended with exit code 42"),
        ("sh -c 'kill -9 $$'", "was ended by signal 9"),
        (r"printf '\377'", "not UTF-8 text"),
        ("nul\0", "cannot be"),
    ],
)
def test_password_command_that_fails_says_how(command: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        config.run_password_command(command)
    assert "Error" not in str(caught.value)


def test_toml_layer(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert config.toml_values(path) == {}
    path.write_text("writeback-delay = 2\nuser = 'me'\n")
    assert config.toml_values(path) == {"writeback-delay": 2, "user": "me"}
    for text, reason in (
        ("password = 'x'", "password-file"),
        ("broken =", r"config\.toml"),
        ("uploads = [1]", r"config\.toml: uploads: must be text, a number"),
        ("[user]", "user: must be text"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            config.toml_values(path)
    with pytest.raises(ConfigError, match="Is a directory"):
        config.toml_values(tmp_path)


def test_a_path_is_found_through_links_and_without_a_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert mountpoint.resolved(tmp_path / "link/x") == tmp_path / "real/x"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert mountpoint.resolved(tmp_path) == tmp_path
    with pytest.raises(MountError, match="the current folder is gone"):
        mountpoint.resolved(Path("x"))


def mounted_at(*lines: tuple[str, str, int]) -> str:
    """A mountinfo with these mounts: folder, type, the uid of whoever mounted it."""
    return "".join(
        f"{n} 1 0:{n} / {point} rw,nosuid - {fstype} cpodfs rw,user_id={uid},group_id=0\n"
        for n, (point, fstype, uid) in enumerate(lines, 40)
    )


@pytest.fixture
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this process takes for the list of mounts; those in it all answer."""
    path = tmp_path / "mountinfo"
    monkeypatch.setattr(mountpoint, "MOUNTINFO", path)
    monkeypatch.setattr(mountpoint, "is_dead", lambda point: False)
    return path


OURS, THEIRS = os.getuid(), os.getuid() + 1


def test_without_a_path_ones_own_mount_is_meant(mountinfo: Path) -> None:
    mountinfo.write_text(
        mounted_at(
            ("/theirs", "fuse.cpodfs", THEIRS),
            ("/ours", "fuse.cpodfs", OURS),
            ("/ours", "fuse.cpodfs", OURS),  # a dead one below it
            ("/other", "fuse.rclone", OURS),
            ("/hidden", "fuse.cpodfs", OURS),
            ("/hidden", "tmpfs", OURS),
        )
    )
    copy = mounted_at(("/ours", "fuse.cpodfs", OURS)).replace("/ours", "/copy")
    with mountinfo.open("a") as file:
        file.write(copy.replace("0:40", "0:42"))
    assert control.mount_of(None) == Path("/ours")


def test_mounts_of_others_are_none_of_ours(mountinfo: Path) -> None:
    mountinfo.write_text(mounted_at(("/theirs", "fuse.cpodfs", THEIRS)))
    with pytest.raises(MountError, match="nothing of yours is mounted"):
        control.mount_of(None)


def test_of_several_mounts_the_working_directory_decides(
    mountinfo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (two / "pod").mkdir(parents=True)
    mountinfo.write_text(
        mounted_at((str(one), "fuse.cpodfs", OURS), (str(two), "fuse.cpodfs", OURS))
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MountError, match=f"which mount.*{one}, {two}"):
        control.mount_of(None)
    monkeypatch.chdir(two / "pod")
    assert control.mount_of(None) == two
    (two / "pod").rmdir()
    with pytest.raises(MountError, match="which mount"):
        control.mount_of(None)


def test_who_gets_the_device_of_a_mount_that_is_gone_is_not_unmounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel gives the next mount the number that has just become free, at once."""
    ours, theirs = (
        mountpoint.MountEntry(Path(path), mountpoint.FSTYPE, "cpodfs", None, "0:57", 31)
        for path in ("/ours", "/theirs")
    )
    there, unmounted = [ours], []

    def unmount(path: Path, *, lazy: bool = False) -> None:
        unmounted.append(path)
        there[:] = [theirs]

    monkeypatch.setattr(mountpoint, "mounts", lambda: list(there))
    monkeypatch.setattr(mountpoint, "unmount", unmount)
    mountpoint.unmount_device("0:57")
    assert unmounted == [Path("/ours")]


def test_a_mount_that_ends_just_then_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of it is then an attribute of the folder below, which must not keep it."""
    monkeypatch.setattr(mountpoint, "find", lambda _mount: object())
    with pytest.raises(MountError, match="not mounted any more"):
        request(tmp_path, "record", pod="p")
    assert os.listxattr(tmp_path) == []


def test_what_such_a_mount_is_told_is_not_left_in_the_folder_below(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="not mounted any more"):
        tell(tmp_path, "drain")
    assert os.listxattr(tmp_path) == []
