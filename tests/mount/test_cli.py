"""The command line as its users meet it, bad input first: real processes, real mounts."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cpodfs import fuse, mountpoint
from cpodfs.cli import main
from cpodfs.cli.mount import mount as mount_command
from cpodfs.cli.umount import _verdict
from tests.mount.harness import CPODFS, Child, Mount, Server, mounted
from tests.mount.refusals import NOWHERE, refused
from tests.patience import PATIENCE_S

CONTEXT = click.Context(main)
COMMANDS = main.list_commands(CONTEXT)


@pytest.fixture
def ready(tmp_path: Path, server: Server) -> Mount:
    """An account and a folder, not yet mounted."""
    return Mount(tmp_path, server)


# -- what keeps a mount from being made ----------------------------------------------------------


@pytest.mark.parametrize("daemon", [[], ["--daemon"]])
def test_server_that_is_not_there(ready: Mount, daemon: list[str]) -> None:
    said = refused(ready, "--server", NOWHERE, *daemon)
    assert f"{NOWHERE} does not answer" in said
    assert mountpoint.find(ready.point) is None


@pytest.mark.parametrize("daemon", [[], ["--daemon"]])
def test_wrong_password(ready: Mount, daemon: list[str]) -> None:
    ready.password_file.write_text("not the password\n")
    said = refused(ready, *daemon)
    assert said == (f"cpodfs: {ready.user} at {ready.server.url}: the server refuses this password")
    assert mountpoint.find(ready.point) is None


def test_unknown_user(ready: Mount) -> None:
    said = refused(ready, "--user", "nobody-here")
    assert said == f"cpodfs: nobody-here at {ready.server.url}: no such user"


def test_what_failed_leaves_no_cache(ready: Mount) -> None:
    refused(ready, "--user", "nobody-here")
    refused(ready, "--server", NOWHERE)
    assert list(ready.cache.iterdir()) == []


class _NotFairOS(BaseHTTPRequestHandler):
    """As yagna answers."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"message": "the app-key is missing or wrong"}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def test_server_that_is_something_else(ready: Mount) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _NotFairOS) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        said = refused(ready, "--server", url)
        other.shutdown()
    assert said.startswith(f"cpodfs: {url} does not answer as FairOS-DFS does (401 for ")
    assert said.endswith("is --server right?")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--server", "gopher://x"], "http://"),
        (["--password-file", "/nonexistent"], "/nonexistent: cannot read the password"),
        (["--password-file", "/dev/null"], "/dev/null: "),
        (["--log-file", "/proc/none/x"], "--log-file: /proc/none/x: cannot be written to: No such"),
    ],
)
@pytest.mark.parametrize("daemon", [[], ["--daemon"]])
def test_options_that_cannot_be(
    ready: Mount, options: list[str], reason: str, daemon: list[str]
) -> None:
    assert reason in refused(ready, *options, *daemon)


def test_fuse_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's own device is not to be touched."""
    assert fuse.trouble(allow_other=False) is None
    monkeypatch.setattr(fuse, "CONFIGURATION", tmp_path / "fuse.conf")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "fuse.conf: No such file" in str(fuse.trouble(allow_other=True))
    (tmp_path / "fuse.conf").write_text("# user_allow_other\n")
    said = str(fuse.trouble(allow_other=True))
    assert said.startswith(
        f"allow-other: user_allow_other is not in {tmp_path}/fuse.conf; as root: "
    )
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    assert fuse.trouble(allow_other=True) is None
    monkeypatch.setattr(fuse, "MTAB", tmp_path / "mtab")
    assert str(fuse.trouble(allow_other=True)) == (
        f"fusermount3: cannot unmount: {tmp_path}/mtab is not there; "
        f"as root: ln -s /proc/self/mounts {tmp_path}/mtab"
    )
    monkeypatch.setattr(fuse, "DEVICE", tmp_path / "fuse")
    said = str(fuse.trouble(allow_other=True))
    assert said.startswith(f"{tmp_path}/fuse: is not there; as root: modprobe fuse")
    (tmp_path / "fuse").touch(mode=0o600)
    tmp_path.chmod(0o755)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    said = str(fuse.trouble(allow_other=True))
    assert said == (
        f"{tmp_path}/fuse: may not be opened by this user (mode 0600); "
        f"as root: chmod 0666 {tmp_path}/fuse"
    )


@pytest.mark.sandbox
def test_without_the_device_one_line_says_so(ready: Mount) -> None:
    """And FUSE's library, which would print another, is not even asked."""
    alone = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    hide = 'mount -t tmpfs none /dev; exec "$@" 2>&1'
    command = [*alone, "sh", "-c", hide, "sh", *ready.command()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stdout == (
        "cpodfs: /dev/fuse: is not there; as root: modprobe fuse; "
        "in a container: --device /dev/fuse --cap-add SYS_ADMIN\n"
    )


def test_what_the_library_says_is_part_of_the_one_line(ready: Mount) -> None:
    if os.geteuid() == 0:
        no_mounting = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    else:
        no_mounting = ("setpriv", "--no-new-privs")
    done = subprocess.run(
        [*no_mounting, *ready.command()], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"cpodfs: {ready.point}: mount failed: Operation not permitted; "
        "in a container, SYS_ADMIN may be missing: --cap-add SYS_ADMIN\n"
    )


def test_password_file_that_others_may_read(ready: Mount) -> None:
    ready.password_file.chmod(0o644)
    assert f"chmod 600 {ready.password_file}" in refused(ready)


def test_no_password_and_no_terminal(ready: Mount) -> None:
    command = [*CPODFS, "mount", str(ready.point), "--user", ready.user]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ready.env,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "cpodfs: no password: use --password-file, --password-command or CPODFS_PASSWORD\n"
    )


def test_mount_points_that_cannot_be(ready: Mount, tmp_path: Path) -> None:
    file, full, foreign = tmp_path / "file", tmp_path / "full", tmp_path / "foreign"
    file.touch()
    (full / "inside").mkdir(parents=True)
    foreign.mkdir()
    if os.getuid() == 0:
        os.chown(foreign, 12345, 12345)
    else:
        foreign = Path("/usr")
    assert "no such folder; make it with: mkdir -p" in refused(ready, point=tmp_path / "missing")
    assert f"{file}: not a directory" in refused(ready, point=file)
    assert f"{full}: not empty" in refused(ready, point=full)
    assert f"{foreign}: belongs to another user" in refused(ready, point=foreign)
    assert "proc is mounted there already" in refused(ready, point=Path("/proc"))
    assert list(full.iterdir()) == [full / "inside"]


def test_mount_point_that_is_a_link(ready: Mount, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(ready.point.name)
    command = ready.command()
    command[command.index("mount") + 1] = str(link)
    ready.command = lambda: command  # type: ignore[method-assign]
    ready.start()
    assert mountpoint.find(ready.point) is not None
    ready.pod()
    assert json.loads(ready.cli("status", "--json", str(link / "pod")).stdout)["pid"] == ready.pid
    ready.cli("sync", str(link))
    ready.cli("umount", str(link))
    assert ready.wait() == 0


def test_commands_without_a_current_folder(mount: Mount, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone}; rmdir {gone}; exec {sys.executable} -P -m cpodfs runs relative"
    env = mount.env | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, env=env, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert "cpodfs: relative: the current folder is gone; cd to " in done.stderr
    assert "Traceback" not in done.stderr


def test_mounted_twice(mount: Mount, tmp_path: Path) -> None:
    assert f"already mounted; see: cpodfs status {mount.point}" in refused(mount)
    other = tmp_path / "other"
    other.mkdir()
    assert f"mounted already (process {mount.pid})" in refused(mount, point=other)
    assert mount.status()["pid"] == mount.pid


def test_cache_from_another_version(mount: Mount) -> None:
    (mount.pod() / "file").write_text("kept")
    assert mount.stop() == 0
    [database] = mount.cache.glob("*/meta.db")
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = database.read_bytes()
    said = refused(mount)
    assert "written in format 99" in said
    assert str(database.parent) in said
    assert database.read_bytes() == before


def test_left_over_from_a_crash(mount: Mount) -> None:
    (mount.pod() / "file").write_text("not yet uploaded")
    mount.kill()
    with pytest.raises(OSError) as caught:
        os.listdir(mount.point)
    assert caught.value.errno == errno.ENOTCONN
    for command in (("status",), ("runs",), ("sync",), ("run", "pod")):
        place = mount.point / "pod" if command[1:] else mount.point
        done = mount.cli(command[0], str(place), check=False)
        assert done.returncode == 1
        assert f"{mount.point}: its driver has died; mount again" in done.stderr
    mount.start()
    assert (mount.point / "pod/file").read_text() == "not yet uploaded"
    mount.remount(wipe=True)
    assert (mount.point / "pod/file").read_text() == "not yet uploaded"


def test_umount_of_a_crashed_mount(mount: Mount) -> None:
    mount.kill()
    done = mount.cli("umount", str(mount.point), check=False)
    assert done.returncode == 1
    assert "the driver had died; unmounted" in done.stderr
    assert mountpoint.find(mount.point) is None


def test_driver_that_hangs(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        for command in ("umount", "status"):
            done = mount.cli(command, str(mount.point), check=False)
            assert done.returncode == 1
            assert "its driver hangs; end it with kill -9" in done.stderr
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    mount.cli("umount", str(mount.point))
    assert mount.wait() == 0


# -- a server that goes away ---------------------------------------------------------------------


def test_offline_mount_serves_the_cache(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, "--stall", "1") as mount:
        pod = mount.pod()
        (pod / "old").write_text("old")
        assert mount.stop() == 0
        own_server.kill()
        mount.start()
        assert (pod / "old").read_text() == "old"
        (pod / "new").write_text("new")
        assert sorted(os.listdir(pod)) == ["new", "old"]
        done = mount.cli("umount", str(mount.point), "--stall", "1", check=False)
        assert done.returncode == 1
        assert "pod/new" in done.stderr
        assert "the next mount tries again" in done.stderr
        assert mount.wait() == 1
        own_server.start_again()
        mount.start()
        mount.remount(wipe=True)
        assert (pod / "new").read_text() == "new"


@pytest.fixture
def broken(tmp_path: Path, own_server: Server) -> Iterator[Mount]:
    """A mount with two files that the server refuses to take."""
    with mounted(tmp_path, own_server, None, "--stall", "1") as mount:
        pod = mount.pod()
        (pod / "fine").write_text("fine")
        mount.sync()
        own_server.faults(error_rate=1.0, match="/v1/file/upload")
        (pod / "one").write_text("1")
        (pod / "two").write_text("2")
        yield mount
        mount.start()
        own_server.faults(error_rate=0.0)
        mount.remount(wipe=True)
        assert sorted(os.listdir(pod)) == ["fine", "one", "two"]


def test_umount_names_what_could_not_be_uploaded(broken: Mount) -> None:
    done = broken.cli("umount", str(broken.point), "--stall", "1", check=False)
    assert done.returncode == 1
    assert "not uploaded: pod/one: " in done.stderr
    assert "not uploaded: pod/two: " in done.stderr
    assert "fine" not in done.stderr
    assert broken.wait() == 1


def test_what_could_not_be_uploaded_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [("a", "refused"), ("b", None), ("a", "not yet deleted")]
    report = {"pid": 1, "left": [{"path": path, "error": error} for path, error in left]}
    (tmp_path / "last-unmount.json").write_text(json.dumps(report))
    assert _verdict({"cache": str(tmp_path), "pid": 1}) == 1
    first, second, _ = capsys.readouterr().err.splitlines()
    assert (first, second) == (
        "cpodfs: not uploaded: a: refused",
        "cpodfs: not uploaded: b: no answer",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_name_what_could_not_be_uploaded(broken: Mount, number: signal.Signals) -> None:
    assert broken.process is not None
    broken.process.send_signal(number)
    assert broken.wait() == 1
    assert "pod/one" in broken.said
    assert "pod/two" in broken.said
    assert "fine" not in broken.said
    assert mountpoint.find(broken.point) is None


# -- ordinary life -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_upload_and_unmount(mount: Mount, number: signal.Signals) -> None:
    (mount.pod() / "file").write_text("text")
    assert mount.process is not None
    mount.process.send_signal(number)
    assert mount.wait() == 0
    assert mountpoint.find(mount.point) is None
    mount.start()
    assert mount.status()["pending"] == 0


def test_signal_ends_a_mount_that_is_in_use(mount: Mount) -> None:
    pod = mount.pod()
    file = os.open(pod / "file", os.O_WRONLY | os.O_CREAT)
    with Child(["sleep", "60"], cwd=pod) as inside:
        os.write(file, b"text")
        assert mount.stop() == 0
        inside.kill()
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        os.close(file)
    assert mountpoint.find(mount.point) is None
    mount.start()
    assert (pod / "file").read_text() == "text"


def test_umount_while_in_use(mount: Mount) -> None:
    pod = mount.pod()
    with (pod / "file").open("w") as file:
        done = mount.cli("umount", str(mount.point), check=False)
        assert done.returncode == 1
        assert f"{mount.point}: in use" in done.stderr
        file.write("still works")
    assert (pod / "file").read_text() == "still works"
    mount.cli("umount", str(mount.point))
    assert mount.wait() == 0


def test_daemon_returns_when_the_mount_answers(ready: Mount) -> None:
    command = [*ready.command(), "--daemon"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ready.env, timeout=PATIENCE_S
    )
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.path.ismount(ready.point)
        assert ready.status()["user"] == ready.user
        (ready.pod() / "file").write_text("text")
        # It must not keep the terminal, nor anything else of its parent's.
        pid = ready.status()["pid"]
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
        assert os.getsid(pid) == pid
        assert stat.S_IMODE(ready.log.stat().st_mode) == 0o600
    finally:
        assert ready.cli("umount", str(ready.point), check=False).returncode == 0
    assert mountpoint.find(ready.point) is None


def test_commands_elsewhere_and_on_the_only_mount(mount: Mount, tmp_path: Path) -> None:
    for command in ("umount", "status", "sync", "refresh"):
        done = mount.cli(command, str(tmp_path), check=False)
        assert done.returncode == 1
        assert f"{tmp_path}: not in a cpodfs mount" in done.stderr
    shown = mount.cli("status", str(mount.pod())).stdout
    assert mount.user in shown
    assert json.loads(mount.cli("status", "--json", str(mount.point)).stdout)["pid"] == mount.pid


def test_systemd_is_told(ready: Mount) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(30)
        ready.env["NOTIFY_SOCKET"] = f"{folder}/notify"
        ready.start()
        first = systemd.recv(4096).decode().splitlines()
        assert "READY=1" in first
        assert f"STATUS={ready.point} is mounted" in first
        (ready.pod() / "file").write_text("text")
        assert ready.stop() == 0
        assert "STOPPING=1" in systemd.recv(4096).decode().splitlines()


# -- help ---------------------------------------------------------------------------------------


def test_every_option_of_mount_has_its_variable() -> None:
    options = [p for p in mount_command.params if p.param_type_name == "option"]
    assert len(options) > 15
    for option in options:
        assert isinstance(option.envvar, list)
        assert option.name is not None
        assert option.envvar[0] == f"CPODFS_{option.name.upper()}"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"] if command else ["-h"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Usage: main {command}".rstrip())
    asked = main.get_command(CONTEXT, command) if command else main
    assert asked is not None
    for param in asked.params:
        if param.param_type_name == "option":
            assert f"{param.opts[0]} " in shown.output
            assert getattr(param, "help", None)
    if not command:
        for name in COMMANDS:
            assert f"\n  {name} " in shown.output
