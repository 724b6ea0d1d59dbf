"""The market's books in SQLite: allocations, agreements, activities, notes, invoices, payments.

Imports nothing of ours but `rest`. The market process is the only writer; `ledger_table` reads
beside it. Amounts are decimal strings, never floats; times are `rest.stamp` texts. What money
does is one transaction each: an invoice is never accepted without its payment, nor twice.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from cpodfs.devnet.rest import Json, Problem, stamp

LEDGER_NAME = "ledger.sqlite"

_SCHEMA = """
-- What must outlive a restart and belongs to no other table: the requestor's identity.
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);

-- Money that a requestor has set aside. released: NULL while it may still be spent from.
CREATE TABLE IF NOT EXISTS allocations (
    id TEXT PRIMARY KEY, address TEXT NOT NULL, platform TEXT NOT NULL,
    total TEXT NOT NULL, spent TEXT NOT NULL DEFAULT '0',
    created TEXT NOT NULL, timeout TEXT, released TEXT);

-- What was spent of an allocation: invoice NULL when it was for a debit note.
CREATE TABLE IF NOT EXISTS spendings (
    allocation TEXT NOT NULL REFERENCES allocations(id),
    agreement TEXT NOT NULL REFERENCES agreements(id),
    activity TEXT REFERENCES activities(id), invoice TEXT REFERENCES invoices(id),
    amount TEXT NOT NULL, created TEXT NOT NULL);

-- state: Approved, then Terminated for good, as the requestor's yagna has it. ended and reason: when
-- and why it was over at its provider, NULL until then.
-- body: the agreement as the Market API shows it (JSON), for a market that is started anew.
-- platform and payer are the requestor's at the time of signing; payee is the provider's address.
CREATE TABLE IF NOT EXISTS agreements (
    id TEXT PRIMARY KEY, provider TEXT NOT NULL, provider_id TEXT NOT NULL,
    platform TEXT NOT NULL, payer TEXT NOT NULL, payee TEXT NOT NULL,
    state TEXT NOT NULL, approved TEXT NOT NULL, ended TEXT, reason TEXT, body TEXT);

-- pid and pid_started (clock ticks, /proc/PID/stat) name the process group that runs now, so that
-- a market that was killed can end it at its next start; NULL when nothing runs.
CREATE TABLE IF NOT EXISTS activities (
    id TEXT PRIMARY KEY, agreement TEXT NOT NULL REFERENCES agreements(id), state TEXT NOT NULL,
    created TEXT NOT NULL, ended TEXT, cpu_s REAL NOT NULL DEFAULT 0,
    duration_s REAL NOT NULL DEFAULT 0, cost TEXT NOT NULL DEFAULT '0',
    pid INTEGER, pid_started INTEGER);

-- amount is the total due for the activity so far, not an increment. status: see _STATUS.
CREATE TABLE IF NOT EXISTS debit_notes (
    id TEXT PRIMARY KEY, agreement TEXT NOT NULL REFERENCES agreements(id),
    activity TEXT NOT NULL REFERENCES activities(id), previous TEXT,
    amount TEXT NOT NULL, usage TEXT NOT NULL, created TEXT NOT NULL, status TEXT NOT NULL);

-- One for each agreement that had an activity, issued when it ends. status: RECEIVED, then ACCEPTED,
-- and SETTLED once the next payment cycle has paid it.
CREATE TABLE IF NOT EXISTS invoices (
    id TEXT PRIMARY KEY, agreement TEXT NOT NULL UNIQUE REFERENCES agreements(id),
    amount TEXT NOT NULL, created TEXT NOT NULL, due TEXT NOT NULL, status TEXT NOT NULL);

-- Of an invoice as a whole, with what its debit notes had been accepted for. Made when it is accepted.
CREATE TABLE IF NOT EXISTS payments (
    id TEXT PRIMARY KEY, invoice TEXT NOT NULL UNIQUE REFERENCES invoices(id),
    allocation TEXT NOT NULL REFERENCES allocations(id), amount TEXT NOT NULL,
    created TEXT NOT NULL, settled TEXT);

-- What the event polls answer. kind: invoice or debit_note; subject: the id of one.
CREATE TABLE IF NOT EXISTS events (
    at TEXT PRIMARY KEY, kind TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL);
"""


def plain(amount: Decimal) -> str:
    """An amount as a decimal string, never with an exponent."""
    return format(amount.normalize(), "f")


@dataclass(frozen=True)
class LedgerRow:
    """One agreement as ``cpodfs devnet ledger`` shows it. Amounts are decimal strings."""

    agreement: str
    provider: str
    state: str
    """``Approved`` (open) or ``Terminated``."""
    approved: str
    ended: str
    activities: int
    cpu_s: float
    duration_s: float
    debit_notes: int
    cost: str
    """The sum of the activities' costs so far."""
    invoiced: str
    """``-`` before the invoice."""
    paid: str
    """What of the invoice is accepted; the next payment cycle pays it."""
    reason: str


class Ledger:
    """All reads and writes of the books. Raises Problem (404, 400) for what a client asks wrongly.

    Every method is synchronous and short (WAL, one row or a few): it is called from the loop.
    """

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / LEDGER_NAME
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)
        for table, column in (("payments", "settled"), ("agreements", "body")):
            self._add_column(table, column)

    def close(self) -> None:
        self._db.close()

    def _add_column(self, table: str, column: str) -> None:
        """For a ledger of an earlier version."""
        known = {row["name"] for row in self._db.execute(f"PRAGMA table_info({table})")}
        if column not in known:
            self._db.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, table: str, key: str) -> sqlite3.Row:
        found = self._db.execute(f"SELECT * FROM {table} WHERE id = ?", (key,)).fetchone()  # noqa: S608
        if found is None:
            raise Problem(404, None)
        row: sqlite3.Row = found
        return row

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        return self._db.execute(sql, values).fetchall()

    def identity(self) -> str:
        """The requestor's node id and wallet address, made at first use and kept."""
        fresh = f"0x{secrets.token_hex(20)}"
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('identity', ?)", (fresh,))
        found = self._db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        return str(found[0])

    # --- allocations ---

    def create_allocation(
        self, address: str, platform: str, total: Decimal, timeout: str | None
    ) -> sqlite3.Row:
        key = secrets.token_hex(16)
        self._db.execute(
            "INSERT INTO allocations (id, address, platform, total, created, timeout)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (key, address, platform, plain(total), stamp(), timeout),
        )
        return self.allocation(key)

    def allocation(self, key: str) -> sqlite3.Row:
        """One that is not released. Raises Problem 404 without words, as yagna does."""
        found = self._one("allocations", key)
        if found["released"]:
            raise Problem(404, None)
        return found

    def allocations(self) -> list[sqlite3.Row]:
        return self.rows("SELECT * FROM allocations WHERE released IS NULL ORDER BY created")

    def amend_allocation(self, key: str, total: Decimal, timeout: str | None) -> sqlite3.Row:
        if total < Decimal(self.allocation(key)["spent"]):
            raise Problem(400, "New allocation would be smaller than the already spent amount")
        self._db.execute(
            "UPDATE allocations SET total = ?, timeout = ? WHERE id = ?",
            (plain(total), timeout, key),
        )
        return self.allocation(key)

    def reserved(self, platform: str) -> Decimal:
        """What is set aside on a platform and not spent."""
        return sum(
            (
                Decimal(row["total"]) - Decimal(row["spent"])
                for row in self.allocations()
                if row["platform"] == platform
            ),
            Decimal(0),
        )

    def spent(self, platform: str) -> Decimal:
        rows = self.rows("SELECT spent FROM allocations WHERE platform = ?", (platform,))
        return sum((Decimal(row["spent"]) for row in rows), Decimal(0))

    def release_allocation(self, key: str) -> None:
        if self._one("allocations", key)["released"]:
            raise Problem(410, f"Allocation {key} has been already released")
        self._db.execute("UPDATE allocations SET released = ? WHERE id = ?", (stamp(), key))

    # --- agreements and activities ---

    def agreement_approved(
        self, body: Json, *, provider: str, provider_id: str, platform: str, payer: str
    ) -> None:
        self._db.execute(
            "INSERT INTO agreements (id, provider, provider_id, platform, payer, payee, state,"
            " approved, body) VALUES (?, ?, ?, ?, ?, ?, 'Approved', ?, ?)",
            (
                *(body["agreementId"], provider, provider_id, platform, payer, provider_id),
                *(stamp(), json.dumps(body)),
            ),
        )

    def agreement(self, key: str) -> Json | None:
        """An agreement that an earlier market has signed, as the Market API shows it."""
        found = self.rows("SELECT state, body FROM agreements WHERE id = ?", (key,))
        if not found or found[0]["body"] is None:
            return None
        body: Json = json.loads(found[0]["body"])
        return {**body, "state": found[0]["state"]}

    def agreement_closed(self, key: str, reason: str) -> None:
        """It is over at its provider; its requestor may still hold it for approved."""
        self._db.execute(
            "UPDATE agreements SET ended = ?, reason = ? WHERE id = ? AND ended IS NULL",
            (stamp(), reason, key),
        )

    def agreement_terminated(self, key: str) -> None:
        self._db.execute("UPDATE agreements SET state = 'Terminated' WHERE id = ?", (key,))

    def oldest_unaccepted(self, agreement: str) -> str | None:
        """When the first debit note came that was not accepted, nor any later one."""
        rows = self.rows(
            "SELECT min(created) AS first FROM debit_notes WHERE agreement = ? AND created >"
            " ifnull((SELECT max(created) FROM debit_notes WHERE agreement = ?"
            " AND status != 'RECEIVED'), '')",
            (agreement, agreement),
        )
        first: str | None = rows[0]["first"]
        return first

    def open_agreements(self) -> list[str]:
        return [
            str(row["id"]) for row in self.rows("SELECT id FROM agreements WHERE ended IS NULL")
        ]

    def activity_created(self, key: str, agreement: str) -> None:
        self._db.execute(
            "INSERT INTO activities (id, agreement, state, created) VALUES (?, ?, 'New', ?)",
            (key, agreement, stamp()),
        )

    def activity_used(
        self, key: str, state: str, *, cpu_s: float, duration_s: float, cost: Decimal
    ) -> None:
        ended = stamp() if state == "Terminated" else None
        self._db.execute(
            "UPDATE activities SET state = ?, ended = ?, cpu_s = ?, duration_s = ?, cost = ?"
            " WHERE id = ?",
            (state, ended, cpu_s, duration_s, plain(cost), key),
        )

    def activity_process(self, key: str, pid: int | None, started: int | None) -> None:
        self._db.execute(
            "UPDATE activities SET pid = ?, pid_started = ? WHERE id = ?", (pid, started, key)
        )

    def activities_left_open(self) -> list[sqlite3.Row]:
        return self.rows("SELECT * FROM activities WHERE ended IS NULL OR pid IS NOT NULL")

    def activity_abandoned(self, key: str) -> None:
        """The market was killed while it ran: what was booked last is what it cost."""
        self._db.execute(
            "UPDATE activities SET state = 'Terminated', ended = ifnull(ended, ?), pid = NULL,"
            " pid_started = NULL WHERE id = ?",
            (stamp(), key),
        )

    # --- debit notes, invoices, payments ---

    def issue_debit_note(
        self, agreement: str, activity: str, amount: Decimal, usage: Sequence[float]
    ) -> str:
        previous = self._db.execute(
            "SELECT id FROM debit_notes WHERE activity = ? ORDER BY created DESC LIMIT 1",
            (activity,),
        ).fetchone()
        key = secrets.token_hex(16)
        with self.transaction():
            self._db.execute(
                "INSERT INTO debit_notes VALUES (?, ?, ?, ?, ?, ?, ?, 'RECEIVED')",
                (
                    *(key, agreement, activity, previous and previous[0]),
                    *(plain(amount), json.dumps(list(usage)), stamp()),
                ),
            )
            self._event("debit_note", "DebitNoteReceivedEvent", key)
        return key

    def issue_invoice(self, agreement: str, due: str, beyond: Decimal = Decimal(0)) -> str | None:
        """Bill an ended agreement for all its activities, and for ``beyond`` GLM more; None when
        there were none."""
        costs = [
            Decimal(row["cost"])
            for row in self.rows("SELECT cost FROM activities WHERE agreement = ?", (agreement,))
        ]
        if not costs:
            return None
        key = secrets.token_hex(16)
        with self.transaction():
            self._db.execute(
                "INSERT INTO invoices VALUES (?, ?, ?, ?, ?, 'RECEIVED')",
                (key, agreement, plain(sum(costs, beyond)), stamp(), due),
            )
            self._event("invoice", "InvoiceReceivedEvent", key)
        return key

    def _event(self, kind: str, name: str, subject: str) -> None:
        self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (stamp(), kind, name, subject))

    def events(self, kind: str, after: str, limit: int) -> list[sqlite3.Row]:
        return self.rows(
            "SELECT * FROM events WHERE kind = ? AND at > ? ORDER BY at LIMIT ?",
            (kind, after, limit),
        )

    def invoice(self, key: str) -> Json:
        row = self._one("invoices", key)
        activities = self.rows("SELECT id FROM activities WHERE agreement = ?", (row["agreement"],))
        return {
            "invoiceId": row["id"],
            **self._parties(row),
            "activityIds": [activity["id"] for activity in activities],
            "amount": row["amount"],
            "paymentDueDate": row["due"],
        }

    def invoices(self) -> list[Json]:
        return [self.invoice(row["id"]) for row in self.rows("SELECT id FROM invoices")]

    def debit_note(self, key: str) -> Json:
        row = self._one("debit_notes", key)
        return {
            "debitNoteId": row["id"],
            **self._parties(row),
            "activityId": row["activity"],
            "previousDebitNoteId": row["previous"],
            "totalAmountDue": row["amount"],
            "usageCounterVector": json.loads(row["usage"]),
        }

    def debit_notes(self) -> list[Json]:
        return [self.debit_note(row["id"]) for row in self.rows("SELECT id FROM debit_notes")]

    def _parties(self, row: sqlite3.Row) -> Json:
        agreement = self._one("agreements", row["agreement"])
        return {
            "issuerId": agreement["provider_id"],
            "recipientId": self.identity(),
            "payeeAddr": agreement["payee"],
            "payerAddr": agreement["payer"],
            "paymentPlatform": agreement["platform"],
            "timestamp": row["created"],
            "agreementId": row["agreement"],
            "status": row["status"],
        }

    def accept_debit_note(self, key: str, amount: Decimal, allocation: str) -> None:
        """Agree to what an activity has cost so far: what is new of it is spent at once."""
        with self.transaction():
            note = self._one("debit_notes", key)
            _check_amount(amount, note)
            if note["status"] != "RECEIVED":
                return
            before = self._accepted("activity", note["activity"])
            self._spend(allocation, note["agreement"], amount - before, activity=note["activity"])
            self._db.execute("UPDATE debit_notes SET status = 'ACCEPTED' WHERE id = ?", (key,))

    def _accepted(self, column: str, key: str) -> Decimal:
        rows = self.rows(f"SELECT amount FROM spendings WHERE {column} = ?", (key,))  # noqa: S608
        return sum((Decimal(row["amount"]) for row in rows), Decimal(0))

    def _spend(
        self,
        key: str,
        agreement: str,
        amount: Decimal,
        *,
        activity: str | None = None,
        invoice: str | None = None,
    ) -> None:
        try:
            allocation = self.allocation(key)
        except Problem:
            raise Problem(400, f"Allocation {key} not found") from None
        left = Decimal(allocation["total"]) - Decimal(allocation["spent"])
        if amount > left:
            raise Problem(400, f"Not enough funds. Allocated: {left} Needed: {amount}")
        if amount <= 0:
            return
        spent = Decimal(allocation["spent"]) + amount
        self._db.execute("UPDATE allocations SET spent = ? WHERE id = ?", (plain(spent), key))
        self._db.execute(
            "INSERT INTO spendings VALUES (?, ?, ?, ?, ?, ?)",
            (key, agreement, activity, invoice, plain(amount), stamp()),
        )

    def accept_invoice(self, key: str, amount: Decimal, allocation_key: str) -> None:
        """Spend on an invoice what its debit notes were not accepted for; again is no error."""
        with self.transaction():
            invoice = self._one("invoices", key)
            _check_amount(amount, invoice)
            if invoice["status"] != "RECEIVED":
                return
            agreement = invoice["agreement"]
            before = self._accepted("agreement", agreement)
            if amount < before:
                raise Problem(400, "Invoice is smaller than agreement.total_amount_accepted.")
            self._spend(allocation_key, agreement, amount - before, invoice=key)
            self._db.execute(
                "INSERT INTO payments VALUES (?, ?, ?, ?, ?, NULL)",
                (secrets.token_hex(16), key, allocation_key, plain(amount), stamp()),
            )
            self._db.execute("UPDATE invoices SET status = 'ACCEPTED' WHERE id = ?", (key,))

    def settle(self) -> None:
        """Pay all that was accepted: one payment cycle."""
        with self.transaction():
            rows = self.rows("SELECT id, agreement FROM invoices WHERE status = 'ACCEPTED'")
            for row in rows:
                key, agreement = row["id"], row["agreement"]
                self._db.execute(
                    "UPDATE payments SET settled = ? WHERE invoice = ?", (stamp(), key)
                )
                self._db.execute("UPDATE invoices SET status = 'SETTLED' WHERE id = ?", (key,))
                self._db.execute(
                    "UPDATE debit_notes SET status = 'SETTLED' WHERE agreement = ?", (agreement,)
                )
                self._event("invoice", "InvoiceSettledEvent", key)

    def is_unsettled(self) -> bool:
        return bool(self.rows("SELECT 1 FROM invoices WHERE status = 'ACCEPTED' LIMIT 1"))

    def payments(self, after: str = "") -> list[Json]:
        found = self.rows(
            "SELECT p.*, i.agreement FROM payments p JOIN invoices i ON i.id = p.invoice"
            " WHERE p.settled > ? ORDER BY p.settled",
            (after,),
        )
        return [self._payment(row) for row in found]

    def _payment(self, row: sqlite3.Row) -> Json:
        agreement = self._one("agreements", row["agreement"])
        share = {
            "agreementId": row["agreement"],
            "amount": row["amount"],
            "allocationId": row["allocation"],
        }
        return {
            "paymentId": row["id"],
            "payerId": self.identity(),
            "payeeId": agreement["provider_id"],
            "payerAddr": agreement["payer"],
            "payeeAddr": agreement["payee"],
            "paymentPlatform": agreement["platform"],
            "amount": row["amount"],
            "timestamp": row["settled"],
            "agreementPayments": [share],
            "activityPayments": [],
            "details": "",
        }


def _check_amount(amount: Decimal, bill: sqlite3.Row) -> None:
    if amount != Decimal(bill["amount"]):
        raise Problem(400, "Invalid amount accepted")


def ledger_table(state_dir: Path) -> list[LedgerRow]:
    """Every agreement in the books of ``state_dir``, oldest first; none when there are no books.

    Safe while a market is writing. Raises sqlite3.Error for a file that is not a ledger.
    """
    path = state_dir / LEDGER_NAME
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        rows = db.execute(
            "SELECT a.*, i.amount AS invoiced, p.amount AS paid FROM agreements a"
            " LEFT JOIN invoices i ON i.agreement = a.id LEFT JOIN payments p ON p.invoice = i.id"
            " ORDER BY a.approved"
        ).fetchall()
        return [_ledger_row(db, row) for row in rows]


def open_points(state_dir: Path) -> list[str]:
    """What keeps the books of ``state_dir`` from balancing, one line each; none when they do.

    They balance when every agreement has ended, every invoice is accepted for its amount, and every
    allocation has spent what was accepted from it and no more than it held.
    Work that was never billed is owed to nobody. Raises sqlite3.Error.
    """
    path = state_dir / LEDGER_NAME
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        return [
            *(
                f"agreement {key[:8]} with {provider} is open"
                for key, provider in db.execute(
                    "SELECT id, provider FROM agreements WHERE ended IS NULL"
                )
            ),
            *_unsettled(db),
            *_overspent(db),
        ]


def _unsettled(db: sqlite3.Connection) -> Iterator[str]:
    rows = db.execute(
        "SELECT a.id, a.provider, i.amount, i.status, p.amount FROM invoices i"
        " JOIN agreements a ON a.id = i.agreement LEFT JOIN payments p ON p.invoice = i.id"
    )
    for key, provider, invoiced, status, paid in rows:
        if paid is None:
            yield f"the invoice of {provider} for agreement {key[:8]} is unpaid: {invoiced}"
        elif status not in {"ACCEPTED", "SETTLED"} or Decimal(paid) != Decimal(invoiced):
            yield f"{provider} was paid {paid} for agreement {key[:8]}, billed {invoiced}"


def _overspent(db: sqlite3.Connection) -> Iterator[str]:
    paid: dict[str, Decimal] = {}
    for key, amount in db.execute("SELECT allocation, amount FROM spendings"):
        paid[key] = paid.get(key, Decimal(0)) + Decimal(amount)
    for key, total, spent in db.execute("SELECT id, total, spent FROM allocations"):
        if Decimal(spent) != paid.get(key, Decimal(0)) or Decimal(spent) > Decimal(total):
            yield f"allocation {key[:8]} of {total} has spent {spent}, accepted are {paid.get(key)}"


def _ledger_row(db: sqlite3.Connection, row: sqlite3.Row) -> LedgerRow:
    used = db.execute(
        "SELECT cpu_s, duration_s, cost FROM activities WHERE agreement = ?", (row["id"],)
    ).fetchall()
    notes = db.execute("SELECT count(*) FROM debit_notes WHERE agreement = ?", (row["id"],))
    return LedgerRow(
        agreement=row["id"],
        provider=row["provider"],
        state=row["state"],
        approved=row["approved"],
        ended=row["ended"] or "",
        activities=len(used),
        cpu_s=sum(one["cpu_s"] for one in used),
        duration_s=sum(one["duration_s"] for one in used),
        debit_notes=notes.fetchone()[0],
        cost=plain(sum((Decimal(one["cost"]) for one in used), Decimal(0))),
        invoiced=row["invoiced"] or "-",
        paid=row["paid"] or "0",
        reason=row["reason"] or "",
    )
