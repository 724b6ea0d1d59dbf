"""What a gateway makes of a requestor's calls: who is rented, what it costs, what is open, what may be."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from cpodfs.runs.gateway_books import Books, Call, Refused
from cpodfs.runs.gateway_failures import FEW, FEW_AFTER_S, MANY

PRICES = {
    "golem.com.scheme": "payu",
    "golem.com.pricing.model": "linear",
    "golem.com.pricing.model.linear.coeffs": [0.001, 0.002, 0.1],
    "golem.com.usage.vector": ["golem.usage.duration_sec", "golem.usage.cpu_sec"],
    "golem.inf.cpu.threads": 2,
    "golem.node.id.name": "one\n",
}
A_SECOND = Decimal("0.005")
"""At most: a second of time, and one of each of two threads."""


class Session:
    """Calls as a requestor makes them, all answered well unless said otherwise."""

    def __init__(self, limit: str | None = None) -> None:
        self.now = 1000.0
        self.books = Books(None if limit is None else Decimal(limit), lambda: self.now)

    def call(self, method: str, path: str, asked: object, said: object, status: int = 200) -> bool:
        return self.books.take(Call(method, path, asked, status, said))

    def allocate(self, key: str = "all", total: str = "1") -> None:
        said = {"allocationId": key, "totalAmount": total, "address": "0xme"}
        said["paymentPlatform"] = "erc20-hoodi-tglm"
        self.call("POST", "/payment-api/v1/allocations", {"totalAmount": total}, said, 201)

    def look_at(self, key: str, state: str = "Proposal", **properties: object) -> None:
        offer = {"properties": PRICES | properties, "providerId": f"0x{key}"}
        said = {"agreementId": key, "offer": offer, "state": state}
        self.call("GET", f"/market-api/v1/agreements/{key}", None, said)

    def agree(self, key: str = "a") -> None:
        self.look_at(key)
        self.books.afford(key)
        self.books.confirming(key)
        self.call("POST", f"/market-api/v1/agreements/{key}/confirm", None, None, 204)
        self.call("POST", f"/market-api/v1/agreements/{key}/wait", None, None, 204)

    def work(self, key: str = "a", activity: str | None = None) -> None:
        said = {"activityId": activity or f"{key}1"}
        self.call("POST", "/activity-api/v1/activity", {"agreementId": key}, said)

    def stop(self, activity: str = "a1", status: int = 200) -> None:
        self.call("DELETE", f"/activity-api/v1/activity/{activity}", None, None, status)

    def terminate(self, key: str = "a") -> None:
        self.call("POST", f"/market-api/v1/agreements/{key}/terminate", {}, None)

    def bill(self, key: str = "a", amount: str = "0.2", status: str = "RECEIVED") -> None:
        said = {"invoiceId": f"i{key}", "agreementId": key, "amount": amount, "status": status}
        self.call("GET", f"/payment-api/v1/invoices/i{key}", None, said)

    def pay(self, key: str = "a", amount: str = "0.2", allocation: str = "all") -> None:
        asked = {"totalAmountAccepted": amount, "allocationId": allocation}
        self.call("POST", f"/payment-api/v1/invoices/i{key}/accept", asked, None)

    def release(self, key: str = "all") -> None:
        self.call("DELETE", f"/payment-api/v1/allocations/{key}", None, None)

    def fail(self, key: str, stderr: str = "", message: str = "exit code 1") -> None:
        """A whole agreement whose first batch fails."""
        self.agree(key)
        self.work(key)
        self.send(key, f"b{key}")
        result = {"index": 2, "result": "Error", "stderr": stderr, "message": message}
        self.results(key, f"b{key}", [{"index": 0, "result": "Ok"}, result])
        self.terminate(key)

    def send(self, key: str, batch: str, *commands: str) -> None:
        text = json.dumps([{name: {}} for name in commands or ("deploy", "start", "run")])
        self.call("POST", f"/activity-api/v1/activity/{key}1/exec", {"text": text}, batch)

    def results(self, key: str, batch: str, results: list) -> None:
        self.call("GET", f"/activity-api/v1/activity/{key}1/exec/{batch}", None, results)


def one(session: Session) -> dict:
    (found,) = session.books.shown()["providers"]
    return found


def test_a_session_that_ends_what_it_began_leaves_nothing() -> None:
    session = Session()
    session.call("POST", "/market-api/v1/demands", {}, "demand", 201)
    session.allocate()
    session.agree()
    session.work()
    open_ones = {"demands": 1, "activities": 1, "agreements": 1, "unpaid": 1, "allocations": 1}
    assert session.books.unsettled() == open_ones
    session.stop()
    session.terminate()
    session.bill()
    session.pay()
    session.release()
    session.call("DELETE", "/market-api/v1/demands/demand", None, None, 204)
    assert session.books.unsettled() == {}
    shown = session.books.shown()
    assert (shown["spent"], shown["accepted"], shown["payer"]) == (0.2, 0.2, "0xme")
    assert (shown["budget"], shown["allocation"], shown["demands"]) == (None, None, [])
    json.dumps(shown)


def test_who_is_rented_and_for_how_much() -> None:
    session = Session()
    session.agree()
    assert one(session)["agreement_state"] == "approved"
    session.work()
    session.work(activity="a2")
    found = one(session)
    assert (found["name"], found["id"]) == ("one\\n", "0xa")
    assert found["price"] == {"start": 0.2, "a_second": float(A_SECOND)}, "of both activities"
    assert found["activities"] == ["a1", "a2"]
    note = {"debitNoteId": "d", "agreementId": "a", "totalAmountDue": "0.15"}
    session.call("GET", "/payment-api/v1/debitNotes/d", None, note)
    assert one(session)["spent"] == 0.15


@pytest.mark.parametrize(
    ("path", "status", "known"),
    [("confirm", 400, False), ("wait", 410, False), ("wait", 408, True), ("wait", 504, True)],
)
def test_an_agreement_is_open_until_it_is_sure_that_it_is_not(
    path: str, status: int, known: bool
) -> None:
    session = Session()
    session.look_at("a")
    session.books.confirming("a")
    session.call("POST", f"/market-api/v1/agreements/a/{path}", None, None, status)
    assert bool(session.books.unsettled()) == known
    if known:
        assert one(session)["agreement_state"] == "confirming"
        session.look_at("a", "Approved")
        assert one(session)["agreement_state"] == "approved"


def test_an_agreement_that_the_provider_has_ended() -> None:
    session = Session()
    session.agree()
    session.work()
    event = {"eventType": "AgreementTerminatedEvent", "agreementId": "a"}
    session.call("GET", "/market-api/v1/agreementEvents", None, [event, 1, {}])
    found = one(session)
    assert (found["agreement_state"], found["activity_state"]) == ("terminated", "ended")
    assert session.books.unsettled() == {"unpaid": 1}


@pytest.mark.parametrize("status", [404, 410, 200])
def test_what_is_gone_need_not_be_ended(status: int) -> None:
    session = Session()
    session.agree()
    session.work()
    session.stop(status=500)
    assert session.books.unsettled()["activities"] == 1
    session.stop(status=status)
    assert "activities" not in session.books.unsettled()


def test_an_allocation_is_held_until_the_bills_are_paid() -> None:
    session = Session()
    session.allocate()
    session.allocate("other")
    session.agree()
    assert not session.books.hold("all"), "nobody has worked yet"
    session.work()
    assert session.books.hold("all")
    session.terminate()
    assert session.books.idle() == []
    session.bill()
    session.pay()
    assert session.books.idle() == ["all"]
    assert not session.books.hold("other")


def test_what_is_set_aside_is_bounded_by_the_limit() -> None:
    session = Session("1")
    assert session.books.grant("0.6") is None
    session.allocate("first", "0.6")
    assert session.books.grant("5") == Decimal("0.4"), "as much as there is"
    assert "got 0.4" in session.books.shown()["warnings"][0]
    assert session.books.grant("0.9", "first") is None, "it is the one that is changed"
    session.allocate("second", "0.4")
    with pytest.raises(Refused, match="1 GLM"):
        session.books.grant("0.1")


def test_what_was_paid_from_a_released_allocation_is_not_given_twice() -> None:
    session = Session("1")
    session.allocate(total="1")
    session.agree()
    session.work()
    session.stop()
    session.terminate()
    session.bill(amount="0.3")
    session.pay(amount="0.3")
    session.release()
    assert session.books.grant("1") == Decimal("0.7")


def test_an_agreement_that_cannot_be_afforded_is_refused() -> None:
    session = Session("0.2")
    session.agree("a")
    with pytest.raises(Refused, match=r"may cost 0\.2 GLM"):
        session.agree("b")
    session.look_at("c", **{"golem.com.pricing.model.linear.coeffs": "free"})
    with pytest.raises(Refused, match="cannot be told"):
        session.books.afford("c")
    Session(None).books.afford("c")


def test_agreements_end_before_time_has_eaten_up_the_limit() -> None:
    session = Session("0.5")
    session.agree()
    session.work()
    while not session.books.exhausted():
        session.now += 1
    spent = Decimal("0.1") + A_SECOND * Decimal(session.now - 1000)
    assert Decimal("0.48") < spent <= Decimal("0.5")
    session.stop()
    session.terminate()
    before = session.books.committed()
    session.now += 1000
    assert session.books.committed() == before, "what has ended costs no more"


def test_many_settled_agreements_are_a_sum() -> None:
    session = Session()
    for number in range(150):
        key = f"n{number}"
        session.agree(key)
        session.work(key)
        session.terminate(key)
        session.bill(key, "0.01")
        if number != 3:
            session.pay(key, "0.01")
    shown = session.books.shown()
    assert len(shown["providers"]) == 101
    assert shown["providers"][0]["agreement"] == "n3"
    assert shown["earlier"] == {"agreements": 49, "spent": 0.49, "accepted": 0.49}
    assert (shown["spent"], shown["accepted"]) == (1.5, 1.49)


@pytest.mark.parametrize("said", [None, 1, "x", [], [1, None, {}], {}, {"agreementId": []}])
def test_odd_answers_are_taken_for_nothing(said: object) -> None:
    session = Session()
    session.agree()
    session.work()
    session.send("a", "b")
    before = session.books.shown()
    for path in (
        *("market-api/v1/agreements/a", "market-api/v1/agreementEvents"),
        *("payment-api/v1/invoices", "payment-api/v1/invoices/i", "payment-api/v1/debitNotes/d"),
        "activity-api/v1/activity/a1/exec/b",
    ):
        session.call("GET", f"/{path}", None, said)
    for path in ("activity-api/v1/activity", "payment-api/v1/allocations"):
        session.call("POST", f"/{path}", said, said)
    assert session.books.shown() == before


# -- failures -------------------------------------------------------------------------------------


def test_many_failures_alike_are_warned_of() -> None:
    session = Session()
    session.fail("before", "other")
    for number in range(MANY - 1):
        session.now += 10
        session.fail(f"n{number}", f"a\nnode 0x{number:040x}: no such file {number}\n")
    assert session.books.failures.streak == MANY - 1
    session.fail("last", "node 0xabc: no such file 99")
    (warning,) = session.books.shown()["warnings"]
    assert warning.startswith(f"the first batch of {MANY} agreements in a row failed alike: node")
    assert "no such file 99" in warning


def test_a_few_are_enough_when_none_has_ever_worked() -> None:
    session = Session()
    for number in range(FEW):
        session.fail(f"n{number}")
    assert session.books.failures.warning() is None
    session.now += FEW_AFTER_S
    assert f"of {FEW} agreements" in (session.books.failures.warning() or "")


def test_one_that_works_ends_the_row() -> None:
    session = Session()
    session.agree("good")
    session.work("good")
    session.send("good", "deployed", "deploy", "start")
    session.results("good", "deployed", [{"result": "Ok", "isBatchFinished": True}])
    session.send("good", "worked")
    session.results("good", "worked", [{"result": "Ok", "isBatchFinished": True}])
    session.send("good", "later")
    session.results("good", "later", [{"result": "Error", "message": "exit code 1"}])
    assert session.books.failures.streak == 0, "its first batch went well"
    for number in range(FEW):
        session.fail(f"n{number}")
    session.now += FEW_AFTER_S
    assert session.books.failures.warning() is None


def test_a_batch_that_is_deployed_only_has_not_worked() -> None:
    session = Session()
    session.agree()
    session.work()
    session.send("a", "deployed", "deploy", "start")
    session.results("a", "deployed", [{"result": "Ok", "isBatchFinished": True}])
    session.send("a", "worked", "run")
    session.results("a", "worked", [{"result": "Error", "message": "exit code 1"}])
    assert session.books.failures.streak == 1


def test_failures_told_by_events() -> None:
    session = Session()
    session.agree()
    session.work()
    session.send("a", "b", "run", "run")
    failures = session.books.failures
    failures.event("b", {"index": 0, "kind": {"finished": {"return_code": 0}}})
    failures.event("b", {"index": 1, "kind": {"stderr": "blender: not found\n"}})
    failures.event("b", {"index": 1, "kind": {"finished": {"return_code": 127, "message": "x"}}})
    for odd in (None, {}, {"kind": 1}, {"kind": {"finished": 1}}):
        failures.event("b", odd)
    assert failures.streak == 1
    assert failures.sentence().endswith("failed alike: blender: not found")
