from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from cpodfs import fuse
from tests.mount.compute import Gate
from tests.mount.disk import CONTROL, Disk, missing, switched_on
from tests.mount.harness import STARTED, Mount, RealServer, Server, mounted, run


@pytest.fixture(scope="session", autouse=True)
def _fuse() -> None:
    """These tests fail, they do not skip, where FUSE is missing."""
    trouble = fuse.trouble(allow_other=False)
    assert trouble is None, str(trouble)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test's report shows what the mounts that it used have written down."""
    report = yield
    if report.failed:
        for mount in STARTED[-2:]:
            report.sections += mount.evidence()
    return report


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not break it; each mount has its own account.

    The development server or, when CPODFS_TEST_DFS_URL is set, a real FairOS-DFS.
    """
    if url := os.environ.get("CPODFS_TEST_DFS_URL"):
        yield RealServer(url)
        return
    server = Server(tmp_path_factory.mktemp("devnet"), "--no-market")
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A development server that the test may break."""
    server = Server(tmp_path / "devnet", "--no-market")
    yield server
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MiB where the test's mount has its cache."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "cache"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", disk)
    yield disk
    run("umount", "-l", disk)


@pytest.fixture
def loop_devices() -> None:
    """The test is skipped, which the last lines of the test run say, where a disk that loses power
    cannot be made; with CI set only where there is no /dev/loop-control."""
    if (reason := missing()) is not None:
        if os.environ.get("CI", "false") != "false" and CONTROL.exists():
            pytest.fail(f"no loss of power can be tested: {reason}")
        pytest.skip(f"NO LOSS OF POWER WAS TESTED: {reason}")


@pytest.fixture
def disk(tmp_path: Path, loop_devices: None) -> Iterator[Disk]:
    """A disk that can lose its power, where the test's mount has its cache."""
    with switched_on(tmp_path / "cache") as disk:
        yield disk


@pytest.fixture
def mount(tmp_path: Path, server: Server) -> Iterator[Mount]:
    with mounted(tmp_path, server) as mount:
        yield mount


@pytest.fixture
def pod(mount: Mount) -> Path:
    return mount.pod()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "outside")
    yield gate
    gate.close()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Mount]:
    """One mount for the tests that take a pod of their own each."""
    with mounted(tmp_path_factory.mktemp("theirs"), server) as mount:
        yield mount
