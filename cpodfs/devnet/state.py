"""The devnet's state folder: where it is, who has it, what it remembers between starts.

Imports errors only. The lock is the kernel's (flock), so it is gone with the process, however that
ends. Secrets are files of mode 0600, made with that mode rather than changed to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from cpodfs.errors import ConfigError

_PORTS_FILE = "ports.json"
_READY_FILE = "ready.json"


def default_state() -> Path:
    """``$XDG_STATE_HOME/cpodfs/devnet``."""
    return platformdirs.user_state_path("cpodfs") / "devnet"


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Own the folder, which is created if missing. Raises ConfigError when another devnet has it."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--state {state}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 20).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise ConfigError(
            f"{state}: a devnet (pid {owner}) is using this folder; stop it, or name another"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        # One that was killed could not take it back.
        (state / _READY_FILE).unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def is_taken(state: Path) -> bool:
    """Whether some devnet has the folder now."""
    try:
        descriptor = os.open(state / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def announced(state: Path, line: str) -> Iterator[None]:
    """Keep the ready line in the folder for the time of the block; see `announcement`."""
    _replace(state / _READY_FILE, line)
    try:
        yield
    finally:
        (state / _READY_FILE).unlink(missing_ok=True)


def announcement(state: Path) -> bytes | None:
    """The ready line of the devnet that has the folder now; None when none does, or not yet."""
    try:
        return (state / _READY_FILE).read_bytes() if is_taken(state) else None
    except FileNotFoundError:
        return None


def secret_file(path: Path) -> str:
    """The secret in ``path``, which is made with a random one (mode 0600) when missing or empty."""
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text().strip():
            return known
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    secret = secrets.token_urlsafe(24)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
    fresh.replace(path)
    return secret


def bound_socket(state: Path, name: str, port: int) -> socket.socket:
    """A loopback socket for server ``name``; port 0 prefers the one that it had last time.

    The port is remembered. Raises ConfigError when a port that was asked for is taken.
    """
    ports = _remembered_ports(state)
    candidates = [port] if port else list(dict.fromkeys((ports.get(name, 0), 0)))
    for candidate in candidates:
        try:
            bound = _bind(candidate)
        except OSError as error:
            if port:
                text = f"--{name}-port {port}: {error.strerror}"
                raise ConfigError(text) from error
            continue
        ports[name] = bound.getsockname()[1]
        _remember_ports(state, ports)
        return bound
    raise ConfigError(f"no free port on 127.0.0.1 for the {name} server")


def _bind(port: int) -> socket.socket:
    new = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        new.bind(("127.0.0.1", port))
    except OSError:
        new.close()
        raise
    return new


def _remembered_ports(state: Path) -> dict[str, int]:
    try:
        known = json.loads((state / _PORTS_FILE).read_text())
        return {str(name): int(port) for name, port in known.items() if 0 < int(port) < 65536}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember_ports(state: Path, ports: dict[str, int]) -> None:
    _replace(state / _PORTS_FILE, json.dumps(ports))


def _replace(path: Path, text: str) -> None:
    """The whole text at once, for whoever reads it meanwhile."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
