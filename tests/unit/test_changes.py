"""What bounds a run may be said at its start: in the recipe's own place for it."""

from __future__ import annotations

import json

import pytest

from cpodfs.errors import RecipeError
from cpodfs.recipe import Recipe, parse_recipe
from cpodfs.runs.changes import apply


def recipe(**golem: object) -> Recipe:
    data = json.dumps({"golem": {"exec": "python3 x.py", **golem}})
    return parse_recipe(data.encode(), file="a.recipe")


def test_the_limits_of_a_session() -> None:
    plain = recipe()
    assert (plain.budget, plain.stop_after) == (None, None)
    bounded, env = apply(plain, {"golem.budget": "0.5", "golem.stop_after": "20"})
    assert (bounded.budget, bounded.stop_after, env) == (0.5, 20, {})
    assert recipe(budget=2, stop_after=3).budget == 2


def test_the_limit_of_a_provider_run_is_its_budget() -> None:
    changed, _ = apply(recipe(runtime={"image": "x", "budget": 1}), {"golem.budget": "0.25"})
    assert changed.runtime is not None
    assert (changed.runtime.budget, changed.budget) == (0.25, None)
    with pytest.raises(RecipeError, match="hire providers themselves"):
        apply(recipe(runtime={"image": "x", "budget": 1}), {"golem.stop_after": "5"})


@pytest.mark.parametrize("cost", ["much", "0", "-1"])
def test_a_limit_is_an_amount(cost: str) -> None:
    with pytest.raises(RecipeError, match=r"golem\.budget"):
        apply(recipe(), {"golem.budget": cost})
