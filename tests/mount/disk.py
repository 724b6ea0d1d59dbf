"""A disk that can lose its power: ``blk.c`` under a loop device, with a real file system on it.

Imports the harness. ``cut`` is the loss of power, ``power_on`` mounts what it left. Needs root, loop
devices, a C compiler and libfuse's headers: ``missing`` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.mount.harness import run
from tests.patience import until

SOURCE = Path(__file__).with_name("blk.c")
CONTROL = Path("/dev/loop-control")
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SIZE_MIB = {"ext4": 192, "xfs": 320, "btrfs": 512}
"""As small as each works with, and with the room that a cache keeps free."""


def missing(fs: str = "ext4") -> str | None:
    """What a disk needs and this machine lacks, in words; None: nothing."""
    if not CONTROL.exists():
        return f"{CONTROL} is not there"
    if os.geteuid() != 0:
        return "only root can attach loop devices"
    for tool in ("gcc", "pkg-config", "losetup", "mount", "umount", MKFS[fs][0]):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(["losetup", "-f"], capture_output=True, text=True)
    return f"no loop device is to be had: {tried.stderr.strip()}" if tried.returncode else None


class Disk:
    """A block device with a volatile write cache, and its file system, mounted at ``point``."""

    def __init__(self, folder: Path, point: Path, *, fs: str = "ext4", size: int = 0) -> None:
        """``folder`` must be the disk's alone; ``size`` in MiB, 0: what ``fs`` needs."""
        self.point = point
        self.fs = fs
        self._folder = folder
        self._files = folder / "device"
        self._files.mkdir(parents=True)
        self._size = size or SIZE_MIB[fs]
        self._loop = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Switch it on for the first time: an empty file system is made, and mounted."""
        program = self._folder / "blk"
        flags = run("pkg-config", "--cflags", "--libs", "fuse3").split()
        run("gcc", "-O2", SOURCE, "-o", program, *flags)
        self._process = subprocess.Popen(
            [program, "-s", "-f", self._files, f"--size={self._size}"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # it must outlive what is on it when a group is signalled
        )
        until((self._files / "disk").exists)
        self._attach()
        run(*MKFS[self.fs], self._loop)
        self._mount(())
        with contextlib.suppress(FileNotFoundError):
            (self.point / "lost+found").rmdir()

    def cut(self, seed: int, percent: int) -> None:
        """Each block that was not flushed survives with this probability; nothing gets there more."""
        self._command(f"cut {seed} {percent}")

    def refuse(self, text: str) -> None:
        """Writes in which this text is fail, as on a bad sector; an empty one: none do any more."""
        self._command(f"refuse {text}")

    def power_on(self, *options: str) -> None:
        """Mount what the cut left, which replays the file system's journal. Whoever had files open
        on it must be dead by now."""
        self._detach()
        self._command("on")
        self._attach()
        self._mount(options)

    def counters(self) -> dict[str, int]:
        """The device's: flushes, writes, and blocks that were kept and lost in cuts."""
        fields = (self._files / "ctl").read_text().split()
        return {name: int(value) for name, value in (field.split("=") for field in fields)}

    def stop(self) -> None:
        """Take all of it down, whatever state it is in."""
        with contextlib.suppress(AssertionError):
            self._detach()
        run("umount", "-l", self.point, check=False)  # where somebody is still inside
        if self._loop:
            run("losetup", "-d", self._loop, check=False)
        run("umount", "-l", self._files, check=False)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _command(self, text: str) -> None:
        (self._files / "ctl").write_text(text)

    def _attach(self) -> None:
        self._loop = run("losetup", "-f", "--show", self._files / "disk").strip()

    def _mount(self, options: tuple[str, ...]) -> None:
        self.point.mkdir(exist_ok=True)
        more = ("-o", ",".join(options)) if options else ()
        run("mount", "-t", self.fs, *more, self._loop, self.point)

    def _detach(self) -> None:
        # Not lazily: a mount that lives on somewhere would be joined, dead as it is, by the next one.
        until(lambda: not self._is_mounted() or self._unmounted())
        if self._loop:
            run("losetup", "-d", self._loop)
            # Another mount namespace (a sandbox's) may have a copy of the mount for a while.
            held = Path("/sys/block", Path(self._loop).name, "loop/backing_file")
            until(lambda: not held.exists())
            self._loop = ""

    def _is_mounted(self) -> bool:
        # Not os.path.ismount: what it asks for is an I/O error on a disk without power.
        return str(self.point) in Path("/proc/self/mounts").read_text().split()

    def _unmounted(self) -> bool:
        return subprocess.run(["umount", self.point], capture_output=True).returncode == 0


@contextlib.contextmanager
def switched_on(point: Path, *, fs: str = "ext4", size: int = 0) -> Iterator[Disk]:
    """A new disk, mounted at ``point`` for the time of the block, and gone after it."""
    folder = Path(tempfile.mkdtemp(prefix="cpodfs-disk-"))
    disk = Disk(folder, point, fs=fs, size=size)
    try:
        disk.start()
        yield disk
    finally:
        disk.stop()
        shutil.rmtree(folder, ignore_errors=True)
