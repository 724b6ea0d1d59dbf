"""Options that several commands have, and where their values come from.

Imports the configuration. A flag goes before a variable of the environment, that before the
configuration file: click's order, which `password_source` keeps for all of the password's places
together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click
from click.core import ParameterSource

from cpodfs.config import config_path, read_password_file, run_password_command, toml_values
from cpodfs.errors import ConfigError
from cpodfs.runs.sandbox import MODES

_F = TypeVar("_F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


class Number(click.FloatRange):
    """Errors call a number a number; what is not a number is none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return number


class WholeNumber(click.IntRange):
    name = "whole number"


class Configured(click.Command):
    """A command whose options may also stand in the configuration file, below all else."""

    knows_all: ClassVar[bool] = True
    """Whether what it does not know is a mistake in the file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if set(args) & set(ctx.help_option_names):
            return super().parse_args(ctx, args)
        path = config_path()
        values = toml_values(path)
        written = {key.replace("-", "_"): key for key in values}
        known = {param.name for param in self.params if isinstance(param, click.Option)}
        if self.knows_all and (unknown := sorted(written.keys() - known)):
            key = written[unknown[0]]
            raise ConfigError(f"{path}: {key}: no such option; see: cpodfs mount --help")
        # As text, as from the environment: 1.5 is no whole number, and 3 is no yes or no.
        texts = {
            key: value if isinstance(value, str) else str(value) for key, value in values.items()
        }
        ctx.default_map = {name: texts[key] for name, key in written.items()}
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            name = "" if error.param is None else error.param.name or ""
            source = ctx.get_parameter_source(name)
            if source is ParameterSource.DEFAULT_MAP:
                raise ConfigError(f"{path}: {written[name]}: {error.message}") from None
            if source is ParameterSource.ENVIRONMENT and error.param is not None:
                variable = next(v for v in error.param.envvar or () if v in os.environ)
                raise ConfigError(f"{variable}: {error.message}") from None
            raise


def configured_option(
    *names: str, aliases: Sequence[str] = (), **settings: Any
) -> Callable[[_F], _F]:
    """An option that is also the variable CPODFS_<NAME>; ``aliases`` are asked after that."""
    variable = "CPODFS_" + names[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=[variable, *aliases], **settings)


_SUBJECT = (
    configured_option(
        "--server",
        metavar="URL",
        default="http://127.0.0.1:9090",
        show_default=True,
        help="The FairOS-DFS server.",
    ),
    configured_option("--user", metavar="NAME", help="The account's name at the server."),
    configured_option(
        "--password-file",
        type=PATH,
        help="File whose first line is the password; only you may read it (mode 0600).",
    ),
    configured_option(
        "--password-command",
        metavar="COMMAND",
        help="Command that prints the password, such as 'pass show dfs'. With neither, the password "
        "is that in CPODFS_PASSWORD, or asked for.",
    ),
    configured_option(
        "--devnet",
        is_flag=True,
        help="Use a store and a Golem market on this machine: those of a `cpodfs devnet` that runs, "
        "else some that are started and stopped with this.",
    ),
    configured_option(
        "--devnet-state",
        type=PATH,
        help="Folder of their state.  [default: $XDG_STATE_HOME/cpodfs/devnet]",
    ),
    configured_option(
        "--cache-dir",
        type=PATH,
        help="Folder for caches, one below it per account.  [default: $XDG_CACHE_HOME/cpodfs]",
    ),
    configured_option(
        "--yagna-url",
        metavar="URL",
        aliases=["YAGNA_API_URL"],
        default="http://127.0.0.1:7465",
        show_default=True,
        help="The yagna daemon that runs talk to (also YAGNA_API_URL); its key is YAGNA_APPKEY's. With "
        "--devnet, where nothing is to be paid by accident, as this flag only.",
    ),
    configured_option(
        "--gsb-url",
        metavar="URL",
        aliases=["GSB_URL"],
        help="Where the gftp of runs finds that daemon (also GSB_URL).  [default: as for gftp, "
        "unix:/tmp/yagna.sock]",
    ),
    configured_option(
        "--network",
        metavar="NAME",
        aliases=["YAGNA_PAYMENT_NETWORK"],
        help="The network to pay on, unless a recipe names another (also YAGNA_PAYMENT_NETWORK).  "
        "[default: hoodi, a test network, or another that yagna has]",
    ),
    configured_option(
        "--driver",
        metavar="NAME",
        aliases=["YAGNA_PAYMENT_DRIVER"],
        help="What to pay with, unless a recipe says so (also YAGNA_PAYMENT_DRIVER).  [default: erc20]",
    ),
    configured_option(
        "--sandbox",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="Run programs in bwrap, where only their pod can be written and other pods and your home "
        "are not to be seen. auto: those of pods that are not your own, where bwrap works.",
    ),
    configured_option("--allow-other", is_flag=True, help="Let other users of this machine in."),
)


def subject_options(command: _F) -> _F:
    """Whose pods, where they and the market are: what `mount` and `doctor` both need to know."""
    for option in reversed(_SUBJECT):
        command = option(command)
    return command


def password_source(ctx: click.Context) -> Callable[[], str] | None:
    """Reads the password from the place that counts; None where somebody must be asked.

    The variable CPODFS_PASSWORD is taken out of the environment: no child gets to see it.
    """
    variable = os.environ.pop("CPODFS_PASSWORD", "")
    readers: dict[str, Callable[[Any], str]] = {
        "password_file": read_password_file,
        "password_command": run_password_command,
    }
    for source in (
        *(ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP),
    ):
        for name, read in readers.items():
            if ctx.params[name] and ctx.get_parameter_source(name) is source:
                return partial(read, ctx.params[name])
        if variable and source is ParameterSource.ENVIRONMENT:
            return lambda: variable
    return None


def own_yagna(ctx: click.Context) -> bool:
    """Whether the devnet's market is not to be used, but the daemon that the user has named. A variable
    that he has for other purposes, or his file, does not say so: a try-out must not cost anything."""
    source = ctx.get_parameter_source("yagna_url")
    return not ctx.params["devnet"] or source is ParameterSource.COMMANDLINE
