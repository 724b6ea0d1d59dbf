"""``cpodfs run``, ``runs``, ``logs`` and ``cancel``: what touching ``.run`` does, for scripts.

Imports `follow` and `pods`. Everything goes through the mount, whose driver does the work.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from cpodfs import mountpoint as mp
from cpodfs import words
from cpodfs.cli.control import mount_of
from cpodfs.cli.follow import POLL_S, Logs, follow, in_progress, log_folder, read_record, run_ids
from cpodfs.cli.options import WholeNumber
from cpodfs.cli.pods import Pod, find_pod
from cpodfs.cli.shown import as_json, say
from cpodfs.cli.tables import Table
from cpodfs.errors import ConfigError, CpodfsError, RunError, RunInProgress

CANCELLED_EXIT = 130
_WIDE = 400
_CELL_LIMIT = 200


@click.command()
@click.argument("pod")
@click.option("--wait", "-w", is_flag=True, help="Print its output, exit with its exit code.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="For this run only: golem.exec, a key of golem.runtime, or any name, which the program "
    "finds as CPODFS_SET_NAME. It is kept in run.json. Repeatable.",
)
@click.option("--max-cost", metavar="GLM", help="The run may cost so much: golem.budget.")
@click.option(
    "--stop-after",
    metavar="N",
    type=WholeNumber(1),
    help="End it when the first batch of N agreements in a row has failed alike.",
)
def run(
    pod: str,
    wait: bool,
    settings: Sequence[str],
    max_cost: str | None,
    stop_after: int | None,
) -> None:
    """Run POD as touching its .run would, and print the run's id.

    With --wait: Ctrl-C cancels the run, a second one leaves it alone. A run that could not be started
    or was lost exits with 1, one ended by a signal with 128 and its number, a cancelled one with 130.
    """
    found = find_pod(pod)
    changes: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: must be KEY=VALUE")
        changes[key] = value
    if max_cost is not None:
        changes["golem.budget"] = max_cost
    if stop_after is not None:
        changes["golem.stop_after"] = str(stop_after)
    answer = _begin(found, changes)
    if not wait:
        say(answer["run"])
        return
    _cancel_on_interrupt(found, answer["run"])
    follow(found, answer["run"], answer["log"])
    record = found.ask("record", run=answer["run"])["record"]
    if record["state"] != "finished":
        # Why a program could not be executed is in its stderr.log, too, and was shown.
        shown = record["started"] and record["exit_code"] is record["signal"] is None
        reason = f": {record['error']}" if record["error"] and not shown else ""
        say(f"cpodfs: run {answer['run']}: {record['state']}{reason}", err=True)
    sys.exit(exit_code(record))


def _begin(pod: Pod, changes: dict[str, str]) -> dict[str, Any]:
    """Start it, and print what its recipe is warned of."""
    try:
        answer = pod.ask("run", changes=changes)
    except CpodfsError:
        state = in_progress(pod)
        if state is None:
            raise
        name = shlex.quote(pod.name)
        raise RunInProgress(
            f"{pod.name}: run {state.get('id')} is in progress; see it: cpodfs logs -f {name}; "
            f"end it: cpodfs cancel {name}"
        ) from None
    for warning in pod.ask("record", run=answer["run"])["record"].get("warnings") or ():
        say(f"cpodfs: warning: {warning}", err=True)
    return answer


def exit_code(record: dict[str, Any]) -> int:
    """What a shell would say of a run that ended like this."""
    if record["state"] == "finished":
        return 0
    if record["state"] == "cancelled":
        return CANCELLED_EXIT
    if record["signal"]:
        return 128 + getattr(signal, record["signal"], 0)
    return record["exit_code"] or 1


def _cancel_on_interrupt(pod: Pod, run_id: str) -> None:
    asked = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            sys.exit(CANCELLED_EXIT)
        asked = True
        state = in_progress(pod)
        if state is not None and state.get("id") == run_id:
            with suppress(OSError):
                pod.control.unlink()
        say("cpodfs: cancelling; Ctrl-C again to leave it to end by itself", err=True)

    signal.signal(signal.SIGINT, interrupt)


@click.command()
@click.argument("pod")
def cancel(pod: str) -> None:
    """End the run of POD, and wait until it has ended."""
    found = find_pod(pod)
    state = in_progress(found)
    try:
        found.control.unlink()
    except FileNotFoundError:
        raise RunError(f"{found.name}: no run is in progress") from None
    except OSError as error:
        raise RunError(f"{found.name}: cannot be cancelled: {error.strerror}") from None
    while True:
        now = in_progress(found)
        if now is None or (state is not None and now.get("id") != state.get("id")):
            return
        time.sleep(POLL_S)


@click.command()
@click.argument("pod")
@click.argument("run", required=False)
@click.option("--follow", "-f", "following", is_flag=True, help="Go on until the run ends.")
def logs(pod: str, run: str | None, following: bool) -> None:
    """Print what RUN (the beginning of its id; default: the newest) of POD wrote.

    Its standard output and its standard error go to ours.
    """
    found = find_pod(pod)
    logs_in = log_folder(found)
    current = in_progress(found) or {}
    # Of a run just begun the folder may not be there yet.
    known = sorted({*run_ids(found, logs_in), *filter(None, [current.get("id")])}, reverse=True)
    chosen = next((name for name in known if name.startswith(run or "")), None)
    if chosen is None:
        raise RunError(f"{found.name}: no such run" if run else f"{found.name}: it never ran")
    folder = current["log"] if chosen == current.get("id") else f"{logs_in}/{chosen}"
    if following:
        shown = follow(found, chosen, folder)
    else:
        shown = Logs(found, folder)
        shown.step()
        shown.end()
    if shown.refused:
        sys.exit(1)


@click.command()
@click.argument("pod", required=False)
@click.option("--json", "json_wanted", is_flag=True, help="For programs.")
@click.option(
    "--last",
    metavar="N",
    type=WholeNumber(1),
    default=10,
    show_default=True,
    help="So many of each pod.",
)
def runs(pod: str | None, json_wanted: bool, last: int) -> None:
    """List the runs of POD, or of all pods of the mount you are in (else of your only one), newest first."""
    found = [
        record for each in _pods(pod) for record in _records(each, last) if record.get("created")
    ]
    found.sort(key=lambda record: str(record["created"]), reverse=True)
    if json_wanted:
        click.echo(as_json(found, 2))
    else:
        # Where nobody looks at it but a program, nothing is cut off.
        width = None if sys.stdout.isatty() else _WIDE
        Console(width=width, highlight=False).print(_table(found))


def _pods(pod: str | None) -> list[Pod]:
    if pod is not None and mp.find(mp.resolved(Path(pod))) is None:
        return [find_pod(pod)]
    mount = mount_of(None if pod is None else Path(pod))
    return [Pod(mount, entry.name) for entry in mount.iterdir()]


def _records(pod: Pod, last: int) -> list[dict[str, Any]]:
    try:
        logs_in = log_folder(pod)
        records = (read_record(pod, f"{logs_in}/{run}") for run in run_ids(pod, logs_in))
        # A fork has the logs of the pod that it was made from.
        own = (record for record in records if record.get("pod", pod.name) == pod.name)
        found = list(itertools.islice(own, last))
    except (OSError, RunError) as error:
        problem = str(error) if isinstance(error, RunError) else f"{pod.name}: {error.strerror}"
        say(f"cpodfs: {problem}", err=True)
        return []
    return [
        {key: value for key, value in record.items() if key != "recipe"} | {"pod": pod.name}
        for record in found
    ]


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for heading in ("pod", "run", "state", "start", "duration", "providers", "GLM", "exit"):
        table.add_column(heading, no_wrap=heading == "run")
    for record in records:
        ending = record.get("signal") or record.get("exit_code")
        table.add_row(
            *(_cell(record.get(key)) for key in ("pod", "id", "state")),
            _local(record.get("started")),
            _duration(record),
            *_hired(record),
            _cell(ending if ending is not None else record.get("error")),
        )
    return table


def _hired(record: dict[str, Any]) -> tuple[str, str]:
    """How many providers a run has had, and what they have cost."""
    golem = record.get("golem")
    if not isinstance(golem, dict):
        return "", ""
    providers, earlier = golem.get("providers"), golem.get("earlier")
    count = len(providers) if isinstance(providers, list) else 0
    if isinstance(earlier, dict) and isinstance(earlier.get("agreements"), int):
        count += earlier["agreements"]
    return str(count), words.cost(golem.get("spent"))


def _cell(value: Any) -> Text:
    # A cell is one line: a record must not look like several.
    text = "" if value is None else str(value)[:_CELL_LIMIT].replace("\n", " ")
    return Text(words.line(text)[:_CELL_LIMIT])


def _moment(value: Any) -> datetime | None:
    """A time in a record, in UTC as the records' are unless they say otherwise."""
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _local(value: Any) -> Text:
    moment = _moment(value)
    try:
        return Text("" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}")
    except (ValueError, OverflowError, OSError):
        # At the end of the years that there are.
        return Text()


def _duration(record: dict[str, Any]) -> Text:
    start = _moment(record.get("started"))
    if start is None:
        return Text()
    end = _moment(record.get("ended")) or datetime.now(UTC)
    seconds = (end - start).total_seconds()
    if seconds < 60:
        return Text(f"{seconds:.1f} s")
    return Text(f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}")
