"""The main job from end to end, told as the commands that a user would type.

Imports errors and the run's file names only. Everything is done from outside: `cpodfs` is started as
a program, and the mount is read and written by this process, which is not the driver. All that is
made lives in one fresh folder, so the user's own mounts, caches and settings are not touched.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpodfs import mountpoint
from cpodfs.errors import CpodfsError

POD_FILES = Path(__file__).with_name("mandelbrot")
COMMAND_S = 120.0
RUN_S = 300.0
POLL_S = 0.05
_ERROR_LINES = 15


class DemoFailed(CpodfsError):
    """A step did not do what it should; says which, and what the program printed."""

    several_lines = True

    def __init__(self, what: str) -> None:
        super().__init__(f"demo: {what}")


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """A new folder for the time of the block, with a short name that can be typed."""
    base = Path(tempfile.gettempdir()).resolve()
    for number in itertools.count(1):
        folder = base / ("cpodfs-demo" if number == 1 else f"cpodfs-demo-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            break
    try:
        yield folder
    finally:
        # Never through a mount, whosever it is.
        if not any(folder in entry.mountpoint.parents for entry in mountpoint.mounts()):
            shutil.rmtree(folder, ignore_errors=True)


class Story:
    """One demo in ``folder``; ``say`` prints a line (or, with ``nl=False``, part of one)."""

    def __init__(self, folder: Path, say: Callable[..., Any]) -> None:
        self.pods = folder / "pods"
        self.pod = self.pods / "mandelbrot"
        self.picture = self.pod / "output/mandelbrot.png"
        self._cache = folder / "cache"
        self._log = folder / "driver.log"
        self._say = say
        self._driver: int | None = None
        """A pidfd."""
        self._env = _environment(os.environ, folder)
        self.pods.mkdir(mode=0o700)

    def tell(self) -> None:
        """Show it all. Raises DemoFailed; leaves the pods mounted."""
        self._title("Mount: a store and a compute market on this machine; no account, no network.")
        self.mount()
        self._title("A pod is a folder. This one is a program with its inputs and a recipe.")
        self._make_pod()
        self._title("Touch .run, and the recipe's command starts; its log grows as you watch.")
        self._run()
        self._title("What the program wrote is in output/.")
        self._show_output()
        self._title("Unmount, forget everything that was cached, mount again: it is all there.")
        self._survive()

    def mount(self) -> None:
        """Mount the devnet; the driver is a process of its own."""
        try:
            self._cpodfs("mount", "--devnet", "--daemon", self.pods)
        finally:
            self._note_driver()

    def _note_driver(self) -> None:
        if self._driver is not None:
            os.close(self._driver)  # of the mount before
            self._driver = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            status = json.loads(os.getxattr(self.pods, "user.cpodfs.status"))
            self._driver = os.pidfd_open(status["pid"])

    def unmount(self) -> None:
        """Upload what is pending and unmount."""
        self._cpodfs("umount", self.pods)

    def end(self) -> list[str]:
        """Unmount, also under the feet of those who are still in there; returns who. Raises
        DemoFailed."""
        inside: list[str] = []
        # Not asked of a driver that is dead or hangs: to look at its mount would hang us.
        with contextlib.suppress(CpodfsError, OSError):
            if mountpoint.find(self.pods) is not None and not mountpoint.is_dead(self.pods):
                inside = mountpoint.holders(self.pods)
        self.stop()
        if mountpoint.find(self.pods) is not None:
            raise DemoFailed(f"{self.pods} could not be unmounted: fusermount3 -uz {self.pods}")
        return inside

    def stop(self) -> None:
        """Unmount, whatever state it is in; says nothing and raises nothing."""
        if mountpoint.find(self.pods) is not None:
            with contextlib.suppress(DemoFailed, OSError):
                self._run_cpodfs(["umount", str(self.pods)])
        if self._driver is not None:
            self._end_driver(self._driver)
        if mountpoint.find(self.pods) is not None:
            with contextlib.suppress(CpodfsError):
                mountpoint.unmount(self.pods, lazy=True)

    def _end_driver(self, pidfd: int) -> None:
        """By SIGTERM, which unmounts even while somebody is inside; by SIGKILL when it hangs."""
        self._driver = None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], COMMAND_S)[0]:
                break
        os.close(pidfd)

    # -- the steps --------------------------------------------------------------------------------

    def _make_pod(self) -> None:
        self._shell("mkdir", self.pod)
        self._shell("cp", "-r", f"{POD_FILES}/.", self.pod)
        self._shell("ls", self.pod)
        self._shell("cat", self.pod / "mandelbrot.recipe")

    def _run(self) -> None:
        control = self.pod / ".run"
        self._shell("touch", control)
        logs = self.pod / json.loads(control.read_text())["log"]
        self._command("tail", "-f", logs / "stdout.log")
        self._follow(logs / "stdout.log", until=lambda: not control.exists())
        self._check_run(logs)

    def _follow(self, path: Path, until: Callable[[], bool]) -> None:
        """Print the file as it grows, until it is complete."""
        deadline = time.monotonic() + RUN_S
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        offset, ended = 0, False
        while True:
            ended = until()  # asked first: what was written before the end is read after it
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(offset)
                news = file.read()
                offset += len(news)
                self._say(decode(news), nl=False)
            if ended:
                return
            if time.monotonic() > deadline:
                raise DemoFailed(f"the run did not end in {RUN_S:g} s")
            time.sleep(POLL_S)

    def _check_run(self, logs: Path) -> None:
        record = json.loads((logs / "run.json").read_text())
        if record["state"] == "finished" and record["exit_code"] == 0:
            return
        reason = record["error"] or f"exit code {record['exit_code']}"
        said = _last_lines((logs / "stderr.log").read_text(errors="replace"))
        raise DemoFailed(f"the run ended as {record['state']!r} ({reason}):\n{said}")

    def _show_output(self) -> None:
        self._shell("ls", "-l", self.pod / "output")
        self._shell("cat", self.pod / "output" / "mandelbrot.txt")

    def _survive(self) -> None:
        before = self._digests()
        self.unmount()
        if any(self.pods.iterdir()):
            raise DemoFailed(f"{self.pods} is not empty after the unmount")
        self._shell("rm", "-r", self._cache)
        self.mount()
        after = self._digests()
        if after != before:
            raise DemoFailed("the pod's files are not what they were before the remount")

    def _digests(self) -> str:
        """A digest of the names and contents of all files in the pod, computed by real tools."""
        script = 'find "$1" -type f -exec sha256sum {} + | sort | sha256sum'
        shown = script.replace('"$1"', _shown(self.pod))
        return self._tool(["sh", "-c", script, "sh", str(self.pod)], f"$ {shown}")

    # -- commands ---------------------------------------------------------------------------------

    def _cpodfs(self, *words: str | Path) -> None:
        self._command("cpodfs", *words)
        code, said = self._run_cpodfs([str(word) for word in words])
        if code:
            log = _last_lines(self._log.read_text(errors="replace")) if self._log.exists() else ""
            reason = said.strip().removeprefix("cpodfs: ")
            raise DemoFailed(f"cpodfs {words[0]} failed: {reason}\n{log}".rstrip())

    def _run_cpodfs(self, words: list[str]) -> tuple[int, str]:
        # A session of its own: Ctrl-C is for us, and we then unmount in order.
        with subprocess.Popen(
            [sys.executable, "-m", "cpodfs", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._env,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=COMMAND_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise DemoFailed(f"cpodfs {words[0]} did not end in {COMMAND_S:g} s") from None
            except KeyboardInterrupt:
                # What has begun to mount must be mounted before it can be unmounted.
                process.wait()
                raise
        return process.returncode, said

    def _shell(self, *words: str | Path) -> None:
        self._tool([str(word) for word in words], _typed(*words))

    def _tool(self, argv: list[str], shown: str) -> str:
        """Run an everyday program, show the command and what it prints."""
        self._say(shown)
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMMAND_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DemoFailed(f"{argv[0]}: {error}") from error
        self._say(done.stdout, nl=False)
        if done.returncode:
            raise DemoFailed(f"{argv[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def _title(self, text: str) -> None:
        self._say(f"\n# {text}")

    def _command(self, *words: str | Path) -> None:
        self._say(_typed(*words))


def _environment(ours: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Ours, but for what would lead a ``cpodfs`` to the user's own account, cache or settings."""
    kept = {k: v for k, v in ours.items() if not k.startswith(("CPODFS_", "YAGNA_"))}
    return kept | {
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CPODFS_LOG_FILE": str(folder / "driver.log"),
        # Not the five seconds of the real market: nobody came to see those.
        "CPODFS_DEVNET_OFFER_DELAY": "0.5",
    }


def _typed(*words: str | Path) -> str:
    return "$ " + " ".join(_shown(word) for word in words)


def _shown(word: str | Path) -> str:
    """A word as one types it: quoted where a shell needs it, home as ``~``."""
    text, home = str(word), str(Path.home())
    if home != "/" and text.startswith(f"{home}/"):
        return "~/" + shlex.quote(text[len(home) + 1 :])
    return shlex.quote(text)


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_ERROR_LINES:])
