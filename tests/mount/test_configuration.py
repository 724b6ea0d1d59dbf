"""Where options and the password come from: flags, variables, one file, and mistakes in each."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cpodfs.cli.options import Configured, password_source, subject_options
from tests.mount.harness import CPODFS, Mount, Server
from tests.mount.refusals import NOWHERE, refused


@pytest.fixture
def ready(tmp_path: Path, server: Server) -> Mount:
    """An account and a folder, not yet mounted."""
    return Mount(tmp_path, server)


def test_flags_before_environment_before_file(ready: Mount, tmp_path: Path) -> None:
    config = tmp_path / "config" / "cpodfs" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        f'server = "{NOWHERE}"\nuser = "of-the-file"\ncache_dir = "{tmp_path}/of-the-file"\n'
        f'password-file = "{ready.password_file}"\nattr-ttl = 7\nlog-file = "{ready.log}"\n'
    )
    ready.env |= {"CPODFS_SERVER": "http://127.0.0.1:2", "CPODFS_USER": ready.user}
    command = [*CPODFS, "mount", str(ready.point), "--server", ready.server.url]
    ready.command = lambda: command  # type: ignore[method-assign]
    ready.start()
    try:
        status = ready.status()
        assert status["server"] == ready.server.url
        assert status["user"] == ready.user
        assert Path(status["cache"]).parent == tmp_path / "of-the-file"
    finally:
        assert ready.stop() == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("u-s-r = 'x'", "u-s-r: no such option; see: cpodfs mount --help"),
        ("attr-ttl = 'x'", "attr-ttl: 'x' is not a valid number."),
        ("attr_ttl = -1", "attr_ttl: -1.0 is not in the range x>=0."),
        ("cache-size = 'big'", "cache-size: 'big' is no size"),
        ("sandbox = 'maybe'", "sandbox: 'maybe' is not one of "),
        ("daemon = 3", "daemon: '3' is not a valid boolean"),
        ("uploads = 1.5", "uploads: '1.5' is not a valid whole number."),
        ("uploads = true", "uploads: 'True' is not a valid whole number."),
        ("attr-ttl = nan", "attr-ttl: 'nan' is not a valid number."),
        ("uploads = [1]", "uploads: must be text, a number, or true or false"),
        ("user = ", "Invalid value"),
        ("password = 'secret'", "password: not here"),
    ],
)
def test_configuration_file_with_a_mistake(
    ready: Mount, tmp_path: Path, text: str, reason: str
) -> None:
    config = tmp_path / "config" / "cpodfs" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(text)
    said = refused(ready)
    assert f"{config}: " in said
    assert reason in said
    assert "secret" not in said
    assert " mount [OPTIONS] MOUNTPOINT" in ready.cli("mount", "--help").stdout


def test_a_bad_flag_is_no_mistake_of_the_file(ready: Mount, tmp_path: Path) -> None:
    config = tmp_path / "config" / "cpodfs" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("attr-ttl = 7")
    done = ready.cli("mount", "--attr-ttl", "x", str(ready.point), check=False)
    assert done.returncode == 2
    assert "'--attr-ttl'" in done.stderr
    assert str(config) not in done.stderr
    ready.env["CPODFS_ATTR_TTL"] = "y"
    assert refused(ready) == "cpodfs: CPODFS_ATTR_TTL: 'y' is not a valid number."


@pytest.mark.parametrize(
    ("flags", "variables", "file", "expected"),
    [
        (["file"], ["file", "command", "value"], ["file"], "file of flag"),
        (["command"], ["file", "command", "value"], ["file"], "command of flag"),
        (["file", "command"], [], [], "file of flag"),
        ([], ["file", "command", "value"], ["file"], "file of variable"),
        ([], ["command", "value"], ["file"], "command of variable"),
        ([], ["value"], ["file", "command"], "value"),
        ([], [], ["file", "command"], "file of file"),
        ([], [], ["command"], "command of file"),
        ([], [], [], None),
    ],
)
def test_the_password_of_a_flag_goes_before_all_others(
    tmp_path: Path, flags: list[str], variables: list[str], file: list[str], expected: str | None
) -> None:
    def setting(kind: str, level: str) -> str:
        if kind == "command":
            return f"echo command of {level}"
        place = tmp_path / level
        place.write_text(f"file of {level}")
        place.chmod(0o600)
        return str(place)

    config = tmp_path / "config" / "cpodfs" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("".join(f"password-{k} = '{setting(k, 'file')}'\n" for k in file))
    env = {
        f"CPODFS_PASSWORD_{k.upper()}": setting(k, "variable") for k in variables if k != "value"
    }
    env |= {"CPODFS_PASSWORD": "value"} if "value" in variables else {}
    arguments = [word for k in flags for word in (f"--password-{k}", setting(k, "flag"))]

    @click.command(cls=Configured)
    @subject_options
    @click.pass_context
    def show(ctx: click.Context, /, **_options: object) -> None:
        source = password_source(ctx)
        assert "CPODFS_PASSWORD" not in os.environ
        click.echo(None if source is None else source())

    gone = {name: None for name in os.environ if name.startswith("CPODFS_PASSWORD")}
    runner = CliRunner(env={**gone, "XDG_CONFIG_HOME": str(tmp_path / "config"), **env})
    done = runner.invoke(show, arguments, catch_exceptions=False)
    assert done.output == f"{expected or ''}\n"


@pytest.mark.parametrize("source", ["file", "command", "variable"])
def test_password_is_seen_nowhere(ready: Mount, source: str) -> None:
    password = ready.password_file.read_text()
    command = ready.command()
    at = command.index("--password-file")
    if source == "command":
        command[at : at + 2] = ["--password-command", f"cat '{ready.password_file}'"]
    elif source == "variable":
        del command[at : at + 2]
        ready.env["CPODFS_PASSWORD"] = password
    command.append("--verbose")
    ready.command = lambda: command  # type: ignore[method-assign]
    ready.start()
    try:
        (ready.pod() / "file").write_text("text")
        ready.sync()
        for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert password.encode() not in cmdline.read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
    finally:
        assert ready.stop() == 0
    assert password not in ready.logged() + ready.said
    for file in ready.cache.rglob("*"):
        assert file.is_dir() or password.encode() not in file.read_bytes()
