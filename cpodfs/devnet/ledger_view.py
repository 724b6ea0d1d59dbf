"""The market's books as a person reads them: a table for the terminal, and a verdict.

Imports `ledger`'s rows and rich. Pure: nothing is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from rich.table import Table

from cpodfs.devnet.ledger import LedgerRow

_ID_CHARS = 8


def as_table(rows: Sequence[LedgerRow]) -> Table:
    """One line for each agreement, within 80 columns; amounts in GLM."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("agreement", "provider", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("seconds", "cpu s", "cost", "invoiced", "paid"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row.agreement[:_ID_CHARS], row.provider, "ended" if row.ended else "open"),
            *(f"{row.duration_s:.1f}", f"{row.cpu_s:.2f}"),
            *(_rounded(amount) for amount in (row.cost, row.invoiced, row.paid)),
        )
    return table


def _rounded(amount: str) -> str:
    return amount if amount == "-" else f"{Decimal(amount):.8f}"


def verdict(rows: Sequence[LedgerRow], points: Sequence[str]) -> str:
    """Whether the books balance, and if not, why."""
    paid = sum((Decimal(row.paid) for row in rows), Decimal(0))
    agreements = f"{len(rows)} agreement{'' if len(rows) == 1 else 's'}"
    if not points:
        return f"balanced: {agreements}, {paid:f} GLM paid"
    return "\n".join(["not balanced:", *(f"  {point}" for point in points)])
