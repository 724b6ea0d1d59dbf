"""What a failed test's report shows of files that drivers and runs wrote, without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SHOWN_CHARACTERS, SHOWN_RUNS = 3000, 3
SECRET_VALUE = re.compile(r"((?:KEY|PASSWORD)[\"']?[=:] *)\S+")


def tails(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """The name and the last characters of each file that is there and not empty."""
    for path in files:
        try:
            said = path.read_text(errors="replace")
        except OSError:
            continue
        if said:
            yield str(path), SECRET_VALUE.sub(r"\1…", said[-SHOWN_CHARACTERS:])


def files_of_runs(folders: Iterable[Path]) -> list[Path]:
    """The files of the last runs among these, each the driver's own folder of a run."""
    latest = sorted(folders, key=lambda run: run.name)[-SHOWN_RUNS:]
    return [path for run in latest for path in sorted(run.iterdir())]
