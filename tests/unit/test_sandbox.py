"""What a sandboxed program is kept from, as far as no mount is needed to see it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cpodfs.runs import sandbox


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


WRITE = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        continue
    print(path)
"""


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.sandbox
def test_nothing_of_the_machine_can_be_set_in_a_sandbox(
    user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened only, never written to: it is this machine's."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    bwrap = sandbox.program()
    assert bwrap is not None
    paths = ["sys/kernel/core_pattern", "sys/vm/drop_caches", "sysrq-trigger", "mtrr"]
    paths += ["irq/default_smp_affinity", "self/oom_score_adj", "pressure/cpu"]
    words = [f"/proc/{path}" for path in paths]
    # The Python of who runs the tests need not be for every user.
    monkeypatch.setattr(sandbox, "_readable", lambda env: [])
    # Not pytest's folder: every user has to come by.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (pod := Path(folder) / "pods/pod").mkdir(parents=True)
        done = subprocess.run(
            [*sandbox.wrapper(bwrap, pod, {}), "/usr/bin/python3", "-c", WRITE, *words],
            capture_output=True,
            text=True,
            user=user,
            group=user,
            extra_groups=[],
        )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.sandbox
def test_what_the_kernel_tells_of_others_is_masked(tmp_path: Path) -> None:
    bwrap = sandbox.program()
    assert bwrap is not None
    script = 'for path; do ! [ -e "$path" ] || cat "$path" || ls "$path"; done'
    words = [f"/proc/{name}" for name in ("keys", "kcore", "timer_list", "acpi", "scsi")]
    done = subprocess.run(
        [*sandbox.wrapper(bwrap, tmp_path, {}), "/bin/sh", "-c", script, "-", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""


KEYS = """
import ctypes, os
from cpodfs.runs import keyring

libc = ctypes.CDLL(None, use_errno=True)
keyctl, session = keyring._KEYCTL[os.uname().machine], ctypes.c_long(-3)

def found():
    return libc.syscall(keyctl, ctypes.c_long(10), session, b"user", b"cpodfs-test", None) > 0

keyring.leave_session()
added = libc.syscall(keyctl - 2, b"user", b"cpodfs-test", b"secret", ctypes.c_long(6), session)
if added < 0 and ctypes.get_errno() in keyring._HARMLESS:
    print("no keyrings here")
else:
    before = found()
    keyring.leave_session()
    print(before, found())
"""


def test_the_keys_of_the_users_session_are_left_behind() -> None:
    done = subprocess.run([sys.executable, "-c", KEYS], capture_output=True, text=True, check=True)
    assert done.stdout in ("True False\n", "no keyrings here\n")
