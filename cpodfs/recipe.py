"""Recipes: which file of a pod is its recipe, what it may say, and what it means.

A leaf: imports errors, commands and pydantic only, touches no file. What it reads was written by strangers:
whatever the bytes, the answer is a `Recipe` or a one-line `RecipeError` naming file and field.
A `Runtime` is handed to the provider run as plain JSON: keep its fields JSON values.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from cpodfs import commands
from cpodfs.errors import RecipeError

RECIPE_LIMIT_BYTES = 1024 * 1024
"""Longest recipe that is looked at. The caller need not fetch a longer file at all."""

DEPTH_LIMIT = 32
"""Levels of nesting; far below what makes ``json.dumps`` of the same value overflow the stack."""

COMMAND_LIMIT_CHARS = 64 * 1024
"""Longest ``golem.exec``: shlex takes time in proportion to the square of it."""

_NAME_LIMIT_BYTES = 255
_WARNINGS_LIMIT = 10
_PROBLEMS_LIMIT = 5
_FOR_A_SHELL = "sh -c '…'"
_SAFE = """sh -c '… "$1" …' sh {}"""
"""How a shell is told a file's name: whatever that is, ``"$1"`` is one word to it."""

_SHELL_WORD = re.compile(
    r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?<!\S)(&&?|\|\|?|\d?>>?|\d>&\d|<|;)(?!\S)""", re.DOTALL
)
"""Group 1: a word that means something to a shell only. What is quoted is passed over."""


@dataclass(frozen=True)
class Runtime:
    """``golem.runtime``: rent the machine, and for how much. Prices and budget are in GLM.

    ``image`` is a hash (``image_is_hash``) or a tag; ``type`` the name of the runtime it is for. ``timeout_s`` covers the whole run,
    ``offer_timeout_s`` the wait for the first agreement. ``max_*`` None: no limit but the budget.
    ``foreach``: a glob relative to the pod, one task per file; None: one program on one provider.
    """

    image: str
    type: str
    budget: float
    min_mem_gib: float
    min_cpu_threads: int
    min_storage_gib: float
    capabilities: tuple[str, ...]
    timeout_s: float
    offer_timeout_s: float
    subnet: str | None
    network: str | None
    driver: str | None
    max_start: float | None
    max_cpu_hour: float | None
    max_env_hour: float | None
    retries: int
    foreach: str | None
    workers: int
    poll_s: float

    @property
    def image_is_hash(self) -> bool:
        return re.fullmatch("[0-9a-f]{56}", self.image) is not None


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been checked.

    The folder names are relative to the pod's root, normalised (no ``.``, ``..``, doubled or outer
    slashes). ``runtime`` is None for a requestor session. ``extra`` holds the keys that we do not
    know, those inside ``golem`` as ``golem.<key>``, inside that as ``golem.runtime.<key>``.
    ``budget`` (GLM) and ``stop_after`` (agreements that failed alike, in a row) bound a requestor
    session. ``raw`` is the document as it was written; treat it as read-only.
    """

    file: str
    name: str
    description: str
    version: str
    author: str
    public: bool
    exec_argv: tuple[str, ...]
    script: str
    payload: str
    output: str
    log: str
    budget: float | None
    stop_after: int | None
    runtime: Runtime | None
    extra: dict[str, Any]
    warnings: tuple[str, ...]
    raw: dict[str, Any]


def is_recipe_name(name: str) -> bool:
    """Whether a file of this name at the root of a pod makes it a compute pod."""
    return name == "recipe.json" or name.endswith(".recipe")


def recipes_in_order(names: Iterable[str]) -> list[str]:
    """The recipe names among ``names``, the one that counts first.

    The order: ``recipe.json``, ``.recipe``, then every other ``*.recipe`` by code point.
    """
    rank = {"recipe.json": 0, ".recipe": 1}
    return sorted({n for n in names if is_recipe_name(n)}, key=lambda n: (rank.get(n, 2), n))


def choose_recipe(names: Iterable[str]) -> str | None:
    """The pod's recipe among the names at its root, or None; see `recipes_in_order`.

    When there are several, hand the rest to `parse_recipe` as ``others``: it warns about them.
    """
    return next(iter(recipes_in_order(names)), None)


def parse_recipe(data: bytes, *, file: str, others: Sequence[str] = ()) -> Recipe:
    """Check a recipe's content. ``file`` is its name, ``others`` the recipes passed over for it.

    Raises RecipeError, always one printable line such as
    ``blender.recipe: golem.exec: must not be empty``.
    """
    raw = _load(data, file)
    try:
        document = _Document.model_validate(raw)
    except ValidationError as exc:
        raise RecipeError(f"{_shown(file)}: {_problems(exc)}") from None
    golem = document.golem
    foreach = golem.runtime is not None and golem.runtime.foreach is not None
    extra = dict(document.model_extra or {})
    extra |= {f"golem.{key}": value for key, value in (golem.model_extra or {}).items()}
    if golem.runtime is not None:
        unknown = golem.runtime.model_extra or {}
        extra |= {f"golem.runtime.{key}": value for key, value in unknown.items()}
    return Recipe(
        file=file,
        name=document.name or file.removesuffix(".json").removesuffix(".recipe") or "recipe",
        description=document.description,
        version=document.version,
        author=document.author,
        public=document.public,
        exec_argv=golem.argv,
        script=golem.script,
        payload=golem.payload,
        output=golem.output,
        log=golem.log,
        budget=golem.budget,
        stop_after=golem.stop_after,
        runtime=None if golem.runtime is None else golem.runtime.result(),
        extra=extra,
        warnings=_warnings(file, golem.command, extra, others, foreach=foreach),
        raw=raw,
    )


def _load(data: bytes, file: str) -> dict[str, Any]:
    where = _shown(file)
    if len(data) > RECIPE_LIMIT_BYTES:
        raise RecipeError(f"{where}: is larger than {RECIPE_LIMIT_BYTES // 1024} KiB")
    try:
        # utf-8-sig: editors on Windows put a BOM in front, which json refuses.
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_refuse_number,
            parse_float=_finite,
        )
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{where}: is not UTF-8 text (byte {exc.start})") from None
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deeply") from None
    except json.JSONDecodeError as exc:
        raise RecipeError(
            f"{where}: is not JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})"
        ) from None
    except ValueError as exc:
        # Ours from the hooks, or Python's refusal of an integer of thousands of digits.
        raise RecipeError(f"{where}: is not JSON: {_shown(str(exc), 120)}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: must be a JSON object, not {_kind(value)}")
    if _depth_exceeds(value, DEPTH_LIMIT):
        raise RecipeError(f"{where}: is nested too deeply (more than {DEPTH_LIMIT} levels)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {_shown(key)!r} appears twice in one object")
        result[key] = value
    return result


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number here")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_shown(text)} is too large")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    # JSON can spell half a surrogate pair, which is neither text nor a file name.
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("is not valid Unicode text")
    return value


def _number_as_text(value: Any) -> Any:
    # ``"version": 1.0`` is written without quotes often enough.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _folder(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    if value.startswith("/"):
        raise ValueError("must be relative to the pod, not absolute")
    if any(c < " " or c == "\x7f" for c in value):
        raise ValueError("must not contain control characters")
    parts = [p for p in _text(value).split("/") if p not in ("", ".")]
    if not parts:
        raise ValueError("must be a folder in the pod, not the pod itself")
    if ".." in parts:
        raise ValueError("must not contain '..'")
    if any(len(p.encode()) > _NAME_LIMIT_BYTES for p in parts):
        raise ValueError(f"has a name longer than {_NAME_LIMIT_BYTES} bytes")
    if parts[0] == ".run" or "index.dfs" in parts:
        raise ValueError("uses a name that is reserved (.run, index.dfs)")
    return "/".join(parts)


def _command(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    if len(value) > COMMAND_LIMIT_CHARS:
        raise ValueError(f"is longer than {COMMAND_LIMIT_CHARS // 1024} KiB")
    _text(value)
    try:
        words = shlex.split(value)
    except ValueError as exc:
        raise ValueError(f"cannot be split into words: {str(exc).lower()}") from None
    if not words or not words[0]:
        raise ValueError("names no program")
    return value


_Text = Annotated[StrictStr, AfterValidator(_text)]
_Version = Annotated[StrictStr, BeforeValidator(_number_as_text), AfterValidator(_text)]
_Folder = Annotated[StrictStr, AfterValidator(_folder)]
_Command = Annotated[StrictStr, AfterValidator(_command)]


_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration_s(value: Any) -> Any:
    """``"90"``, ``"30m"``, ``"1h30m"`` or a number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be a duration like '30m', not {_kind(value)}")  # noqa: TRY004
    text = value.replace(" ", "")
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?[smhd])+|\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        raise ValueError("must be a duration like '45s', '30m' or '1h30m'")
    parts = re.findall(r"([\d.]+)([smhd]?)", text, re.ASCII)
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def _glob(value: str) -> str:
    value = _folder(value)
    if not any(c in value for c in "*?["):
        raise ValueError("must be a pattern with *, ? or [")
    if "**" in value.split("/")[:1] or value.startswith("*"):
        raise ValueError("must begin with a folder of the pod, as in 'payload/*.txt'")
    return value


_Price = Annotated[StrictFloat, Field(ge=0, le=1e9)]
_Seconds = Annotated[float, BeforeValidator(_duration_s)]
_Word = Annotated[StrictStr, AfterValidator(_text), Field(pattern=r"^[A-Za-z0-9_.:/@+-]{1,200}$")]


# What Golem calls experimental begins with "!"; nothing here can end a constraint or mean another.
_Capability = Annotated[
    StrictStr, AfterValidator(_text), Field(pattern=r"^!?[A-Za-z0-9_.:/@+-]{1,200}$")
]


class _MaxPrice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    start: _Price | None = None
    cpu_hour: _Price | None = None
    env_hour: _Price | None = None


class _Runtime(BaseModel):
    model_config = ConfigDict(extra="allow")

    image: _Word
    type: _Word = "vm"
    budget: Annotated[StrictFloat, Field(gt=0, le=1e9)]
    min_mem_gib: Annotated[StrictFloat, Field(gt=0, le=1e5)] = 0.5
    min_cpu_threads: Annotated[StrictInt, Field(ge=1, le=10_000)] = 1
    min_storage_gib: Annotated[StrictFloat, Field(ge=0, le=1e6)] = 2.0
    capabilities: Annotated[list[_Capability], Field(max_length=20)] = []
    timeout: Annotated[_Seconds, Field(ge=1, le=30 * 86400)] = 1800.0
    offer_timeout: Annotated[_Seconds, Field(ge=1, le=86400)] = 60.0
    subnet: _Word | None = None
    network: _Word | None = None
    driver: _Word | None = None
    max_price: _MaxPrice = _MaxPrice()
    retries: Annotated[StrictInt, Field(ge=0, le=100)] = 2
    foreach: Annotated[StrictStr, AfterValidator(_glob)] | None = None
    workers: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    poll: Annotated[_Seconds, Field(ge=0.1, le=3600)] = 2.0

    def result(self) -> Runtime:
        return Runtime(
            **self.model_dump(
                exclude={"capabilities", "timeout", "offer_timeout", "max_price", "poll"},
                include=set(_Runtime.model_fields),
            ),
            capabilities=tuple(self.capabilities),
            timeout_s=self.timeout,
            offer_timeout_s=self.offer_timeout,
            max_start=self.max_price.start,
            max_cpu_hour=self.max_price.cpu_hour,
            max_env_hour=self.max_price.env_hour,
            poll_s=self.poll,
        )


class _Golem(BaseModel):
    model_config = ConfigDict(extra="allow")

    command: _Command = Field(alias="exec")
    script: _Folder = "script"
    payload: _Folder = "payload"
    output: _Folder = "output"
    log: _Folder = "logs"
    budget: Annotated[StrictFloat, Field(gt=0, le=1e9)] | None = None
    stop_after: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    runtime: _Runtime | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        return tuple(shlex.split(self.command))

    @model_validator(mode="after")
    def _limits_are_of_sessions(self) -> _Golem:
        if self.runtime is not None and (self.budget or self.stop_after):
            raise ValueError(
                "budget and stop_after are for programs that hire providers themselves"
            )
        return self

    @model_validator(mode="after")
    def _results_stay_out_of_the_script(self) -> _Golem:
        # A run must not change what it is trusted for.
        for field, folder in (("output", self.output), ("log", self.log)):
            if folder == self.script or folder.startswith(f"{self.script}/"):
                raise ValueError(f"{field} must not be the script folder or lie inside it")
            if self.script.startswith(f"{folder}/"):
                raise ValueError(f"script must not lie inside the {field} folder")
        return self

    @model_validator(mode="after")
    def _names_are_no_program(self) -> _Golem:
        if self.runtime is not None and self.runtime.foreach is not None:
            word = commands.unsafe_place(self.argv)
            if word is not None:
                what = "{} in" if commands.PLACE in word else "in the place of"
                raise ValueError(
                    f"exec: {what} '{_shown(word)}' a file's name would be a piece of the program; pass "
                    f"it as an argument: {_SAFE}"
                )
        return self


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: _Text = ""
    description: _Text = ""
    version: _Version = ""
    author: _Text = ""
    public: StrictBool = False
    golem: _Golem


def _warnings(
    file: str, command: str, extra: dict[str, Any], others: Sequence[str], *, foreach: bool
) -> tuple[str, ...]:
    found = [f"{_shown(file)}: {_shown(key)}: unknown key, kept" for key in extra]
    if for_a_shell := next(filter(None, (m[1] for m in _SHELL_WORD.finditer(command))), None):
        found.insert(
            0,
            f"{_shown(file)}: golem.exec: no shell runs it, so {for_a_shell} is but an argument; if it "
            f"is meant for a shell: {_SAFE if foreach else _FOR_A_SHELL}",
        )
    if others:
        listed = ", ".join(_shown(name) for name in others[:_WARNINGS_LIMIT])
        found.insert(0, f"{_shown(file)}: is used; there are other recipes: {listed}")
    if len(found) > _WARNINGS_LIMIT:
        rest = len(found) - _WARNINGS_LIMIT
        found[_WARNINGS_LIMIT:] = [f"{_shown(file)}: and {rest} more warnings"]
    return tuple(found)


def _problems(exc: ValidationError) -> str:
    problems = exc.errors(include_url=False)
    shown = [
        f"{'.'.join(_shown(str(part)) for part in problem['loc'])}: {_reason(problem)}"
        for problem in problems[:_PROBLEMS_LIMIT]
    ]
    more = f" (and {len(problems) - len(shown)} more)" if len(problems) > len(shown) else ""
    return f"{'; '.join(shown)}{more}"


def _reason(problem: Any) -> str:
    wanted = {
        "string_type": "text",
        "bool_type": "true or false",
        "dict_type": "an object",
        "model_type": "an object",
        "int_type": "a whole number",
        "float_type": "a number",
        "list_type": "a list",
    }
    kind = problem["type"]
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "extra_forbidden":
        return "is not known"
    if kind in wanted:
        return f"must be {wanted[kind]}, not {_kind(problem['input'])}"
    return _shown(str(problem["msg"]), 200)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "something else")


def _shown(text: str, limit: int = 60) -> str:
    """One printable line, whatever the file is called or a key says."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
