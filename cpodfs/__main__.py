"""``cpodfs`` and ``python -m cpodfs``: standard streams first, then the commands.

Imports the commands only when the streams are there: where a caller has closed standard error
(``2>&-``), the next file opened anywhere would become it, and get what is written to it.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    _open_streams()
    from cpodfs.cli import main as commands  # here: only now may files be opened

    commands()


def _open_streams() -> None:
    """Have ``/dev/null`` stand in for closed standard streams, here and in all that we start."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one: those below it are open by now.
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


if __name__ == "__main__":
    main()
