"""Tables that commands print, harmless as all that is `shown`.

Imports words and rich, which is why it is no part of `shown`: few commands have a table.
"""

from __future__ import annotations

from typing import Any

import rich.table
from rich.text import Text

from cpodfs import words


class Table(rich.table.Table):
    """A table whose cells are text, each in its line, and never markup."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        texts = (Text(words.line(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*texts, **options)
