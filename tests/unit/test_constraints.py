from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpodfs.devnet.constraints import MAX_DEPTH, ConstraintError, parse
from cpodfs.devnet.provider import DEFAULT_PROVIDERS

OFFER = {
    "golem.inf.mem.gib": 8.0,
    "golem.inf.cpu.threads": 4,
    "golem.runtime.name": "vm",
    "golem.runtime.capabilities": ["vpn", "inet"],
    "golem.runtime.version@v": "0.3.10",
    "golem.node.id.name": "amber-falcon (1)",
    "golem.srv.caps.multi-activity": True,
    "started@d": "2026-03-01T00:00:00+00:00",
    "empty": [],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("()", True),
        ("(&)", True),
        ("(|)", False),
        ("(golem.inf.mem.gib>=8)", True),
        ("(golem.inf.mem.gib>8)", False),
        ("(golem.inf.mem.gib<=8.0)", True),
        ("(golem.inf.mem.gib<8)", False),
        ("(golem.inf.cpu.threads=4)", True),
        ("(golem.inf.cpu.threads!=4)", False),
        ("(golem.inf.cpu.threads>=10)", False),
        ("(golem.inf.cpu.threads=many)", False),
        ("(golem.runtime.name=vm)", True),
        ("( golem.runtime.name = vm )", True),
        ("(golem.runtime.name=v*)", True),
        ("(golem.runtime.name=*)", True),
        ("(golem.runtime.name=w*)", False),
        ("(golem.runtime.name!=wasm*)", True),
        ("(golem.node.id.name=amber-falcon \\281\\29)", True),
        ("(golem.node.id.name=*falcon*)", True),
        ("(golem.runtime.capabilities=vpn)", True),
        ("(golem.runtime.capabilities=[vpn,inet])", True),
        ("(golem.runtime.capabilities=[vpn])", False),
        ("(golem.runtime.capabilities=manifest-support)", False),
        ("(golem.runtime.capabilities!=vpn)", False),
        ("(empty=x)", False),
        ("(golem.runtime.version@v>=0.3.9)", True),
        ("(golem.runtime.version@v<0.3.9)", False),
        ("(golem.runtime.version=0.3.10)", True),
        ("(started@d>2026-02-28T23:00:00+00:00)", True),
        ("(golem.srv.caps.multi-activity=true)", True),
        ("(golem.srv.caps.multi-activity=false)", False),
        ("(missing=1)", None),
        ("(missing=*)", None),
        ("(!(missing=1))", None),
        ("(&(missing=1)(golem.runtime.name=wasm))", False),
        ("(|(missing=1)(golem.runtime.name=vm))", True),
        ("(&(missing=1)(golem.runtime.name=vm))", None),
        ("(!(golem.runtime.name=wasm))", True),
        ("((golem.runtime.name=vm))", True),
        (
            "(&(golem.inf.mem.gib>=0.5)\n\t(golem.runtime.name=vm)\n\t(|(x=1)(empty!=y)))",
            True,
        ),
    ],
)
def test_truth(text: str, expected: bool | None) -> None:
    found = parse(text)
    assert found.truth(OFFER) is expected
    assert found.matches(OFFER) is (expected is True)


@pytest.mark.parametrize(
    "text",
    ["(", ")", "(a=1", "a=1", "(a)", "(a=1)(b=2)", "(!)", "(!(a=1)(b=2))", "(&(a=1)b)", "(=1)"],
)
def test_refused(text: str) -> None:
    with pytest.raises(ConstraintError):
        parse(text)


def test_depth_is_bounded() -> None:
    parse("(!" * MAX_DEPTH + "(a=1)" + ")" * MAX_DEPTH)
    with pytest.raises(ConstraintError, match="levels"):
        parse("(" * 100_000)


@given(st.text(alphabet="()&|!=<>*\\@ab1. \n", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except ConstraintError:
        return
    assert found.truth({"a": 1, "b": ["a", 1.5], "ab": "1"}) in {True, False, None}


leaves = st.builds(
    "({}{}{})".format,
    st.sampled_from(["a", "b", "missing"]),
    st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
    st.integers(0, 3),
)
filters = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"(&{''.join(parts)})"),
        st.lists(inner, max_size=3).map(lambda parts: f"(|{''.join(parts)})"),
        inner.map("(!{})".format),
    ),
    max_leaves=8,
)


@given(filters, filters, st.integers(0, 3), st.integers(0, 3))
def test_laws_of_logic(left: str, right: str, a: int, b: int) -> None:
    properties = {"a": a, "b": b}

    def truth(text: str) -> bool | None:
        return parse(text).truth(properties)

    assert truth(f"(!(!{left}))") is truth(left)
    assert truth(f"(!(&{left}{right}))") is truth(f"(|(!{left})(!{right}))")
    assert truth(f"(&{left}{right})") is truth(f"(&{right}{left})")


def test_default_providers_fit_a_usual_demand() -> None:
    wanted = parse(
        "(&(golem.node.debug.subnet=public)"
        "(golem.com.payment.platform.erc20-holesky-tglm.address=*)"
        "(golem.com.pricing.model=linear)(golem.inf.mem.gib>=0.5)(golem.inf.storage.gib>=2.0)"
        "(golem.inf.cpu.threads>=1)(golem.runtime.name=vm))"
    )
    for spec in DEFAULT_PROVIDERS:
        assert wanted.matches(spec.offer(spec.node_id(0)))
    assert len({spec.name for spec in DEFAULT_PROVIDERS}) == len(DEFAULT_PROVIDERS)
