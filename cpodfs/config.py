"""What the user may choose, from flags, environment and one TOML file, as one frozen value.

A leaf: imports only errors. Click reads flags and ``CPODFS_*`` variables; ``toml_values`` gives it
the file ``$XDG_CONFIG_HOME/cpodfs/config.toml`` as the lowest layer.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

from cpodfs.errors import ConfigError

APP = "cpodfs"
PASSWORD_S = 60.0
"""A command may ask a person for something before it prints the password."""

RUN_GRACE_S = 40.0
"""yapapi's shutdown takes up to 30 s when it waits for invoices, which is three quarters of this."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All times in seconds."""

    server: str
    user: str
    mountpoint: Path
    cache_dir: Path
    writeback_delay_s: float = 5.0
    attr_ttl_s: float = 60.0
    timeout_s: float = 30.0
    stall_s: float = 30.0
    uploads: int = 4
    changes: int = 8
    downloads: int = 4
    cache_size: int = 10 << 30
    fsync_remote: bool = False
    allow_other: bool = False
    network: str | None = None
    driver: str | None = None
    """What the user wants runs to pay with; None: whatever yagna has for tests."""
    sandbox: str = "auto"
    local_market: bool = False
    """Whether providers are processes of this machine."""
    unconfined: str | None = None
    """Why those are in no sandbox, if they are not."""
    keep_runs: int = 20
    run_grace_s: float = RUN_GRACE_S


def config_path() -> Path:
    return platformdirs.user_config_path(APP) / "config.toml"


def toml_values(path: Path) -> dict[str, Any]:
    """The file's values by their keys as written there. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for key, value in values.items():
        if key == "password":
            advice = "use password-file, password-command or CPODFS_PASSWORD"
            raise ConfigError(f"{path}: password: not here; {advice}")
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{path}: {key}: must be text, a number, or true or false")
    return values


def account_cache(base: Path | None, server: str, user: str) -> Path:
    """The cache folder of one account: readable by people, unique by a hash."""
    base = base or platformdirs.user_cache_path(APP)
    digest = hashlib.sha256(f"{server.rstrip('/')}\0{user}".encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{user}@{urlsplit(server).netloc}")[:80]
    return base / f"{readable}-{digest}"


def cache_folders() -> list[Path]:
    """The cache folders of accounts in the usual place."""
    base = platformdirs.user_cache_path(APP)
    return sorted(path.parent for path in base.glob("*/content")) if base.is_dir() else []


def read_password_file(path: Path) -> str:
    """The first line of a file that only its owner may read. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise ConfigError(
                    f"{path}: others may read it; run: chmod 600 {shlex.quote(str(path))}"
                )
            password = file.readline(4096).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the password: {error}") from error
    if not password:
        raise ConfigError(f"{path}: empty; the password belongs on its first line")
    return password


def run_password_command(command: str) -> str:
    """What a credential helper prints on its first line. Raises ConfigError; shows no output."""
    try:
        argv = shlex.split(command)
        if not argv:
            raise ConfigError("password-command: is empty")
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, timeout=PASSWORD_S, check=False, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        reason = f"did not end within {PASSWORD_S:g} s"
    except OSError as error:
        reason = f"{argv[0]}: {error.strerror}"
    except UnicodeDecodeError:
        reason = "printed something that is not UTF-8 text"
    except ValueError as error:
        reason = f"cannot be split into words: {str(error).lower()}"
    else:
        password = done.stdout.partition("\n")[0]
        if done.returncode == 0 and password:
            return password
        reason = f"ended with exit code {done.returncode}" if done.returncode else "printed nothing"
        if done.returncode < 0:
            reason = f"was ended by signal {-done.returncode}"
    raise ConfigError(f"password-command {command!r}: {reason}")
