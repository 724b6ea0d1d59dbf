"""What a trusted run itself writes into its pod does not end the trust; what others write does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cpodfs.dfs import Client
from tests.mount.compute import run_folders, run_to_end, text, wait_gone
from tests.mount.harness import Mount, Server, mounted, sh
from tests.mount.strangers import forked, reason, recipe_files, touch, vouch
from tests.mount.test_trust_own import elsewhere
from tests.patience import until

DENIED = "Permission denied"
SCAN = 'n=$(ls | grep -c ^scan); echo "$n" > "scan-2026-11-27T10:0$n.log"'
"""What yapapi's examples do: a log with the time in its name beside the recipe."""


@pytest.fixture(params=["auto", "off"])
def pods(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Iterator[Mount]:
    options = ("--attr-ttl", "600", "--sandbox", request.param)
    with mounted(tmp_path, server, None, *options) as mount:
        yield mount


def trusted(mount: Mount, name: str, script: str, **files: str) -> Path:
    """A stranger's pod that was looked at; ``files``: dots in their names are written ``_``."""
    more = {path.replace("_", "."): content for path, content in files.items()}
    pod = forked(mount, name, recipe_files(script=script) | more)
    vouch(pod)
    return pod


def refused(pod: Path, names: str) -> None:
    """The touch is refused, and these files are named for it."""
    assert DENIED in touch(pod)
    expected = f"its code has changed since it was trusted: {names}; look again: cpodfs trust"
    assert expected in reason(pod)


def put_elsewhere(mount: Mount, pod: Path, name: str, content: bytes) -> None:
    """Another machine's session writes a file into the pod, and this mount hears of it."""

    async def put(client: Client) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield content

        await client.upload(pod.name, "/", name, body, len(content))

    mount.sync()
    elsewhere(mount, put)
    mount.cli("refresh", str(pod))


def test_a_log_beside_the_recipe_is_the_runs_own_doing(pods: Mount) -> None:
    pod = trusted(pods, "scan", SCAN)
    for number in range(4):
        run_to_end(pod)
        assert (pod / f"scan-2026-11-27T10:0{number}.log").read_text() == f"{number}\n"
    assert "It is trusted already." in pods.cli("trust", str(pod)).stdout
    pods.sync()
    pods.remount(wipe=True)
    run_to_end(pod)
    assert len(list(pod.glob("scan-*"))) == 5


def test_a_file_of_the_forks_that_each_run_writes_again(pods: Mount) -> None:
    script = "date >> app.log; mkdir -p deep/er; date > deep/er/x; rm -f old.log; mv deep moved$(date +%N)"
    pod = trusted(pods, "shipped", script, app_log="by its author\n", old_log="1")
    for _ in range(3):
        run_to_end(pod)
    assert not (pod / "old.log").exists()
    assert len(list(pod.glob("moved*/er/x"))) == 3


def test_a_name_that_a_run_has_used_is_no_pass(pods: Mount) -> None:
    """Somebody else's content under it is somebody else's; and so is one more file."""
    pod = trusted(pods, "same-name", SCAN)
    run_to_end(pod)
    (log,) = pod.glob("scan-*")
    put_elsewhere(pods, pod, log.name, b"import evil\n")
    assert log.read_text() == "import evil\n"
    refused(pod, log.name)
    put_elsewhere(pods, pod, log.name, b"0\n")
    run_to_end(pod)
    put_elsewhere(pods, pod, "json.py", b"evil")
    refused(pod, "json.py")


def test_what_is_changed_here_after_the_run_is_another_change(pods: Mount) -> None:
    pod = trusted(pods, "after", SCAN)
    run_to_end(pod)
    (log,) = pod.glob("scan-*")
    sh(f"echo more >> {log.name}; chmod +x {log.name}; mkdir -p 'a  b'; touch 1 2 3", pod)
    refused(pod, "1, 2, 3 and 2 more")
    shown = pods.cli("trust", "--yes", str(pod)).stdout
    assert "It has CHANGED since it was trusted: 1, 2, 3 and 2 more\n" in shown
    run_to_end(pod)


def waiting(mount: Mount, name: str, script: str) -> Path:
    """The same, running: ``script`` was carried out, and ``payload/go`` is waited for."""
    wait = 'echo up; while [ ! -e "$CPODFS_PAYLOAD/go" ]; do sleep 0.05; done'
    wait += "; [ ! -e late ] || echo on >> late"
    pod = forked(mount, name, recipe_files(script=f"{script}\n{wait}") | {"payload/x": "1"})
    vouch(pod)
    assert touch(pod) == ""
    until(lambda: run_folders(pod) and text(run_folders(pod)[0] / "stdout.log") == "up\n")
    return pod


def go_on(pod: Path) -> None:
    (pod / "payload/go").touch()
    wait_gone(pod)


@pytest.mark.parametrize(
    ("number", "change", "names"),
    [
        (0, "echo 1 > json.py", "json.py"),
        (1, "echo more >> scan.log", "scan.log"),
        (2, "mv scan.log new.log; echo 1 > late", "late, new.log"),
        (3, "mv made other", "other, other/x"),
        (4, "chmod +x scan.log", "scan.log"),
        (5, "cp script/x.sh new; truncate -s 1 made/x", "made/x, new"),
    ],
)
def test_what_others_change_here_during_a_run_is_not_the_runs_doing(
    pods: Mount, number: int, change: str, names: str
) -> None:
    pod = waiting(pods, f"during-{number}", "echo 1 > scan.log; mkdir made; echo 11 > made/x")
    sh(change, pod)
    go_on(pod)
    refused(pod, names)


def test_a_file_that_somebody_holds_open_for_writing(pods: Mount) -> None:
    pod = trusted(pods, "held", "echo 1 >> app.log; echo 1 >> read.log", app_log="", read_log="")
    with (pod / "app.log").open("a") as writing, (pod / "read.log").open() as reading:
        run_to_end(pod)
        writing.write("mine")
        assert reading.read() == "1\n"
    refused(pod, "app.log")


def test_what_the_server_brings_during_a_run(pods: Mount) -> None:
    pod = waiting(pods, "brought", "echo 1 > scan.log")
    put_elsewhere_unheard(pods, pod)
    go_on(pod)
    pods.cli("refresh", str(pod))
    refused(pod, "json.py")


def put_elsewhere_unheard(mount: Mount, pod: Path) -> None:
    with pytest.raises(AssertionError, match="stays as it is"):
        put_elsewhere(mount, pod, "json.py", b"evil")


@pytest.mark.parametrize(
    ("number", "script", "names"),
    [
        (0, "echo echo evil > script/x.sh", "script/x.sh"),
        (1, "echo > script/new.log", "script/new.log"),
        (2, "cp a.recipe recipe.json", "recipe.json"),
        (3, "printf ' ' >> a.recipe", "a.recipe"),
        (4, "touch b.recipe; echo 1 > fine", "b.recipe"),
        (6, "echo 1 > json.py; echo 1 > a.log", "json.py"),
        (7, "echo 1 > a.log; chmod +x a.log; mkdir x; touch x/Makefile", "a.log, x/Makefile"),
        (5, "mv script away; mkdir script; echo echo evil > script/x.sh", "away/x.sh, script/x.sh"),
    ],
)
def test_what_a_run_starts_from_is_looked_at_again_whoever_changes_it(
    pods: Mount, number: int, script: str, names: str
) -> None:
    pod = trusted(pods, f"itself-{number}", script)
    run_to_end(pod)
    refused(pod, names)


@pytest.mark.parametrize(
    ("number", "command"),
    [
        (0, "sh tools/main.sh"),
        (1, "sh ./tools//main.sh"),
        (2, "sh -c 'cd tools; sh main.sh'"),
        (3, "env A=1 sh tools/main.sh"),
        (4, "sh -c 'sh tools/*.sh'"),
        (5, "sh -c 'cd \"$CPODFS_PAYLOAD/../tools\"; sh main.sh'"),
    ],
)
def test_what_the_command_names_is_what_it_starts_from(
    pods: Mount, number: int, command: str
) -> None:
    main = 'cd "$CPODFS_SCRIPT/.."; echo 1 > out.log; echo echo evil > tools/main.sh'
    pod = forked(pods, f"named-{number}", recipe_files(command) | {"tools/main.sh": main})
    vouch(pod)
    run_to_end(pod)
    refused(pod, "tools/main.sh")


@pytest.mark.parametrize(
    ("number", "command"),
    [(1, "sh -c 'sh $CPODFS_PAYLOAD/main'"), (2, "sh -c 'cd ${CPODFS_PAYLOAD}; sh main'")],
)
def test_what_the_command_names_by_a_variable(pods: Mount, number: int, command: str) -> None:
    main = 'cd "$CPODFS_SCRIPT/.."; echo 1 > payload/new; echo echo evil > payload/main'
    pod = forked(pods, f"variable-{number}", recipe_files(command) | {"payload/main": main})
    vouch(pod)
    run_to_end(pod)
    refused(pod, "payload/main")


def test_a_run_that_goes_on_without_its_driver_is_not_known_well_enough(
    tmp_path: Path, server: Server
) -> None:
    """Who has changed what is not told any more: then the user is asked."""
    with mounted(tmp_path, server, None, "--sandbox", "off") as mount:
        pod = waiting(mount, "adopted", "echo 1 > scan.log")
        mount.kill()
        mount.start()
        go_on(pod)
        refused(pod, "scan.log")


def test_a_record_of_a_version_that_kept_the_hash_only(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server) as mount:
        pod = trusted(mount, "old", SCAN)
        (sheet,) = (tmp_path / "state/cpodfs/trust").glob("*/*.json")
        assert sheet.stat().st_mode & 0o777 == 0o600
        sheet.unlink()
        run_to_end(pod)
        run_to_end(pod)
        sheet.write_text("{")
        assert DENIED in touch(pod)
        assert "its code has changed since it was trusted; look again" in reason(pod)
