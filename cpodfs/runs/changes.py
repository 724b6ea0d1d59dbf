"""What the user changes for one run of a pod: ``cpodfs run --set key=value``.

Imports recipe and errors. Kinds of keys: ``golem.exec``, the command; ``golem.runtime.…``, what
is asked of providers; ``golem.budget`` and ``golem.stop_after``, what bounds the run (all these values
are JSON where they can be read as such, else text); and any plain
name, which the program finds in its environment as ``CPODFS_SET_<NAME>`` (not at a provider, where
programs get no environment).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from cpodfs.errors import ConfigError
from cpodfs.recipe import Recipe, parse_recipe

EXEC, RUNTIME = "golem.exec", "golem.runtime."
BUDGET, STOP_AFTER = "golem.budget", "golem.stop_after"
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LIMIT_BYTES = 32 * 1024


def apply(recipe: Recipe, changes: Mapping[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The recipe as changed, and the variables to add. Raises ConfigError or RecipeError."""
    raw = copy.deepcopy(recipe.raw)
    env: dict[str, str] = {}
    for key, value in changes.items():
        if "\0" in value or len(value.encode(errors="replace")) > _LIMIT_BYTES:
            raise ConfigError(f"--set {key}: the value is too long, or has a NUL character in it")
        if key == EXEC:
            raw["golem"]["exec"] = value
        elif key == BUDGET and recipe.runtime is not None:
            _set(raw, recipe, f"{RUNTIME}budget", value)
        elif key in (BUDGET, STOP_AFTER):
            raw["golem"][key.removeprefix("golem.")] = _value(value)
        elif key.startswith(RUNTIME):
            _set(raw, recipe, key, value)
        elif _PLAIN.fullmatch(key):
            if recipe.runtime is not None:
                raise ConfigError(f"--set {key}: at a provider no variable is set; use {EXEC}")
            env[f"CPODFS_SET_{key.upper()}"] = value
        else:
            raise ConfigError(
                f"--set {key}: not a plain name, {EXEC}, {BUDGET}, {STOP_AFTER} or something in {RUNTIME.rstrip('.')}"
            )
    if raw == recipe.raw:
        return recipe, env
    changed = parse_recipe(json.dumps(raw).encode(), file=recipe.file)
    return dataclasses.replace(changed, warnings=recipe.warnings), env


def _set(raw: dict[str, Any], recipe: Recipe, key: str, text: str) -> None:
    if not isinstance(raw["golem"].get("runtime"), dict):
        raise ConfigError(f"--set {key}: {recipe.file} has no golem.runtime")
    where: dict[str, Any] = raw["golem"]["runtime"]
    *folders, name = key.removeprefix(RUNTIME).split(".")
    for folder in folders:
        inner = where.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {key}: {folder} is no object in {recipe.file}")
        where = inner
    if not name:
        raise ConfigError(f"--set {key}: no name")
    where[name] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
