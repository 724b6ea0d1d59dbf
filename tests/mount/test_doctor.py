"""``cpodfs doctor``: green where all is well, and where it is not, the right finding with a fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from cpodfs.cli import main
from cpodfs.devnet import launch
from tests.mount.compute import devnet_mounted
from tests.mount.harness import CPODFS, Server
from tests.patience import PATIENCE_S

NOWHERE = "http://127.0.0.1:1"
NAMES = [
    *("python", "pyfuse3", "yapapi", "/dev/fuse", "fusermount3", "sandbox", "cache"),
    *("server", "account", "yagna", "app-key", "funds", "gftp"),
]


class Patient:
    """Somebody who asks the doctor; ``env`` and ``options`` are what he has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: list[str] = []
        self.env = os.environ | {
            name: str(folder / name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")
        }
        self.env["XDG_CACHE_HOME"] = str(folder / "cache")
        for name in [n for n in self.env if n.startswith(("YAGNA_", "CPODFS_PASSWORD", "GSB_"))]:
            del self.env[name]

    def ask(self, *options: str) -> tuple[int, str]:
        command = [*CPODFS, "doctor", *self.options, *options]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.env, timeout=PATIENCE_S
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    def findings(self, *options: str) -> dict[str, dict[str, str]]:
        """As ``ask``, but in this process, where yapapi is imported already."""
        gone = dict.fromkeys(os.environ.keys() - self.env.keys())
        runner = CliRunner(env={**self.env, **gone})
        done = runner.invoke(main, ["doctor", "--json", *self.options, *options])
        found = {finding["name"]: finding for finding in json.loads(done.stdout)}
        assert done.exit_code == (1 if any(f["state"] == "bad" for f in found.values()) else 0)
        assert all(f["fix"] for f in found.values() if f["state"] in ("bad", "warn"))
        return found


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Devnet]:
    with launch.start(tmp_path_factory.mktemp("doctor")) as running:
        yield running.devnet


@pytest.fixture
def patient(tmp_path: Path, net: launch.Devnet) -> Patient:
    """A user of the devnet's servers, by the options for real ones: all is well."""
    patient = Patient(tmp_path)
    patient.options = [
        *("--server", net.dfs_url, "--user", net.user, "--password-file", str(net.password_file)),
        *("--yagna-url", str(net.yagna_url)),
    ]
    assert net.app_key_file is not None
    patient.env["YAGNA_APPKEY"] = net.app_key_file.read_text().strip()
    patient.env["PATH"] = f"{net.run_path_dir}{os.pathsep}{patient.env['PATH']}"
    patient.env["GSB_URL"] = "tcp://127.0.0.1:1"
    return patient


@pytest.mark.sandbox
def test_all_is_well(patient: Patient) -> None:
    found = patient.findings()
    assert list(found) == NAMES
    assert {f["state"] for f in found.values()} == {"ok"}, found
    code, said = patient.ask()
    assert code == 0
    assert "→" not in said
    for secret in (patient.env["YAGNA_APPKEY"], Path(patient.options[5]).read_text().strip()):
        assert secret not in said + json.dumps(found)


def test_looking_leaves_nothing_behind(patient: Patient, net: launch.Devnet) -> None:
    headers = {"Authorization": f"Bearer {patient.env['YAGNA_APPKEY']}"}
    url = f"{net.yagna_url}/payment-api/v1/allocations"
    before = httpx.get(url, headers=headers).json()
    patient.findings()
    assert httpx.get(url, headers=headers).json() == before


@pytest.mark.sandbox
def test_the_devnet_of_a_mount_and_one_for_the_occasion(tmp_path: Path) -> None:
    patient = Patient(tmp_path)
    patient.options = ["--devnet", "--devnet-state", str(tmp_path / "devnet")]
    assert {f["state"] for f in patient.findings().values()} == {"ok"}
    with devnet_mounted(tmp_path) as mount:
        found = patient.findings()
        assert {f["state"] for f in found.values()} == {"ok"}, found
        assert found["server"]["text"] == f"{mount.status()['server']} answers"


def test_nothing_is_running(patient: Patient) -> None:
    found = patient.findings("--server", NOWHERE, "--yagna-url", NOWHERE)
    states = {name: found[name]["state"] for name in NAMES[-6:-1]}
    assert states == {
        "server": "bad",
        "account": "unknown",
        "yagna": "bad",
        "app-key": "unknown",
        "funds": "unknown",
    }
    assert "yagna service run" in found["yagna"]["fix"]
    assert "--devnet" in found["server"]["fix"]
    code, said = patient.ask("--server", NOWHERE)
    assert code == 1
    assert "→ is --server right" in said


@pytest.mark.parametrize(
    ("options", "name", "state", "text"),
    [
        (["--user", "nobody-here"], "account", "bad", "nobody-here: no such user"),
        (["--server", "ftp://x"], "server", "bad", "ftp://x"),
        (
            ["--network", "moon"],
            "funds",
            "bad",
            "no network 'moon' for erc20; it has holesky, hoodi,",
        ),
        (["--driver", "zk"], "funds", "bad", "no payment driver 'zk'; it has erc20"),
        (["--network", "polygon"], "funds", "ok", "0.1 could be set aside, erc20 on polygon"),
        (["--gsb-url", "unix:/none"], "gftp", "warn", "would not find yagna: /none is not there"),
        (["--cache-dir", "/etc/passwd/x"], "cache", "bad", "/etc/passwd: cannot be written to"),
        (["--sandbox", "off"], "sandbox", "ok", "not asked for"),
    ],
)
@pytest.mark.sandbox
def test_options_that_do_not_fit(
    patient: Patient, options: list[str], name: str, state: str, text: str
) -> None:
    found = patient.findings(*options)
    assert found[name]["state"] == state
    assert text in found[name]["text"]
    assert all(f["state"] == "ok" for n, f in found.items() if n not in (name, "account", "cache"))


def test_passwords(patient: Patient, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong-password")
    wrong.chmod(0o600)
    found = patient.findings("--password-file", str(wrong))
    assert found["account"]["state"] == "bad"
    assert "wrong-password" not in json.dumps(found)
    del patient.options[4:6]
    found = patient.findings()
    assert found["account"]["state"] == "unknown"
    assert "CPODFS_PASSWORD" in found["account"]["fix"]
    del patient.options[2:4]
    assert patient.findings()["account"]["text"] == "whose?"


def test_app_keys(patient: Patient) -> None:
    patient.env["YAGNA_APPKEY"] = "not-the-key"
    found = patient.findings()
    assert (found["app-key"]["state"], found["funds"]["state"]) == ("bad", "unknown")
    assert "yagna app-key create" in found["app-key"]["fix"]
    assert "not-the-key" not in json.dumps(found)
    del patient.env["YAGNA_APPKEY"]
    assert patient.findings()["app-key"]["text"] == "YAGNA_APPKEY is not set"


def test_programs_that_are_missing(patient: Patient, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    patient.env["PATH"] = str(tmp_path / "bin")
    found = patient.findings()
    states = {name: found[name]["state"] for name in ("fusermount3", "sandbox", "gftp")}
    assert states == {"fusermount3": "bad", "sandbox": "warn", "gftp": "bad"}
    assert "apt install fuse3" in found["fusermount3"]["fix"]
    assert patient.findings("--sandbox", "on")["sandbox"]["state"] == "bad"


def test_a_cache_that_others_can_read(patient: Patient, tmp_path: Path) -> None:
    folder = Path(patient.findings()["cache"]["text"].rpartition(": ")[0])
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    found = patient.findings()
    assert found["cache"]["fix"] == f"chmod 700 {folder}"
    shutil.rmtree(folder)


def test_the_configuration_file_counts(patient: Patient, tmp_path: Path) -> None:
    config = tmp_path / "XDG_CONFIG_HOME/cpodfs/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'server = "{NOWHERE}"\nattr-ttl = 7\n')
    patient.options = patient.options[2:]
    assert patient.findings()["server"]["text"].startswith(f"{NOWHERE} does not answer")


# -- a yagna that says other things ---------------------------------------------------------------


@contextmanager
def yagna(answers: dict[str, tuple[int, object]]) -> Iterator[str]:
    """A server that gives these answers, by "METHOD path"; else 404."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, body = answers.get(f"{self.command} {self.path}", (404, None))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ME = {"GET /me": (200, {"identity": "0xabc"})}
ACCOUNTS = {
    "GET /payment-api/v1/requestorAccounts": (
        200,
        [
            {
                "platform": "erc20-hoodi-tglm",
                "address": "0xabc",
                "driver": "erc20",
                "network": "hoodi",
            }
        ],
    )
}
FRESH: dict[str, tuple[int, object]] = {"GET /payment-api/v1/requestorAccounts": (200, [])}
"""What a daemon that works says between its start and its first allocation."""
OLD = {"GET /payment-api/v1/batchCycles": (200, [{"platform": "zk-holesky-tglm"}, 1])}
ALLOCATE = "POST /payment-api/v1/allocations"


@pytest.mark.parametrize(
    ("answers", "name", "state", "text"),
    [
        (
            ME | ACCOUNTS | {ALLOCATE: (400, {"message": "Insufficient funds"})},
            *("funds", "bad", "400 Insufficient funds"),
        ),
        (
            ME | ACCOUNTS | {ALLOCATE: (400, {"title": "x", "detail": "Insufficient\nfunds"})},
            *("funds", "bad", "erc20 on hoodi: 400 Insufficient\\nfunds"),
        ),
        (ME | ACCOUNTS | {ALLOCATE: (500, {"message": "oops"})}, "funds", "bad", "500 oops"),
        (ME | ACCOUNTS | {ALLOCATE: (500, b"<html>")}, "funds", "bad", "500"),
        (ME | ACCOUNTS | {ALLOCATE: (408, {})}, "funds", "unknown", "408"),
        (ME | ACCOUNTS | {ALLOCATE: (201, {"allocationId": "a"})}, "funds", "ok", "set aside"),
        (ME | FRESH | {ALLOCATE: (201, {"allocationId": "a"})}, "funds", "ok", "no account yet"),
        (
            ME | FRESH | {ALLOCATE: (500, {"detail": "Account not registered"})},
            *("funds", "bad", "500 Account not registered"),
        ),
        (ME | FRESH | OLD, "funds", "bad", "no payment driver 'erc20'; it has zk"),
        (ME, "funds", "bad", "requestorAccounts: 404"),
        ({"GET /me": (200, b"hello")}, "yagna", "bad", "not what yagna says"),
        ({}, "yagna", "bad", "404"),
    ],
)
def test_what_yagna_may_say(
    patient: Patient, answers: dict, name: str, state: str, text: str
) -> None:
    with yagna(answers) as url:
        found = patient.findings("--yagna-url", url)
    assert (found[name]["state"], text in found[name]["text"]) == (state, True), found[name]


def test_a_server_that_is_something_else(patient: Patient) -> None:
    with yagna({}) as url:
        assert patient.findings("--server", url)["server"]["state"] == "bad"


@pytest.mark.sandbox
def test_the_server_of_other_tests_will_do(patient: Patient, server: Server) -> None:
    user, password = server.signup()
    patient.env["CPODFS_PASSWORD"] = password
    patient.options = ["--server", server.url, "--user", user, *patient.options[-2:]]
    assert {f["state"] for f in patient.findings().values()} == {"ok"}
