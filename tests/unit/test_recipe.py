"""Recipes: choice among several, every field, and what hostile input becomes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpodfs.errors import RecipeError
from cpodfs.recipe import (
    RECIPE_LIMIT_BYTES,
    Recipe,
    choose_recipe,
    is_recipe_name,
    parse_recipe,
    recipes_in_order,
)

BLENDER = {
    "name": "blender",
    "description": "renders",
    "version": "1.0",
    "author": "reza",
    "public": True,
    "golem": {
        "exec": "python3 script/blender.py",
        "script": "script",
        "payload": "payload",
        "output": "output",
        "log": "logs",
    },
}


def parse(golem=None, **top) -> Recipe:
    document = {"golem": {"exec": "x"} | (golem or {})} | top
    return parse_recipe(json.dumps(document).encode(), file="a.recipe")


def refusal(data: bytes | str, file: str = "a.recipe") -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data.encode() if isinstance(data, str) else data, file=file)
    text = str(caught.value)
    assert text.isprintable()
    return text


def golem_refusal(**golem) -> str:
    return refusal(json.dumps({"golem": {"exec": "x"} | golem}))


def test_names():
    assert [n for n in ("a.recipe", ".recipe", "recipe.json") if is_recipe_name(n)] == [
        "a.recipe",
        ".recipe",
        "recipe.json",
    ]
    assert not any(map(is_recipe_name, ("recipe", "a.json", "a.recipe.bak", "", "A.RECIPE")))


def test_choice_is_the_same_in_any_order():
    names = ["b.recipe", "x", "a.recipe", ".recipe", "recipe.json"]
    expected = ["recipe.json", ".recipe", "a.recipe", "b.recipe"]
    assert recipes_in_order(names) == recipes_in_order(reversed(names)) == expected
    assert choose_recipe(names) == "recipe.json"
    assert choose_recipe(["b.recipe", "a.recipe"]) == "a.recipe"
    assert choose_recipe(["readme"]) is None


def test_the_recipe_of_the_documentation():
    recipe = parse_recipe(json.dumps(BLENDER).encode(), file="blender.recipe")
    assert recipe.exec_argv == ("python3", "script/blender.py")
    assert (recipe.name, recipe.version, recipe.public) == ("blender", "1.0", True)
    assert recipe.runtime is None
    assert recipe.warnings == ()
    assert recipe.raw == BLENDER


def test_defaults():
    recipe = parse()
    assert (recipe.script, recipe.payload, recipe.output, recipe.log) == (
        "script",
        "payload",
        "output",
        "logs",
    )
    assert recipe.name == "a"
    assert parse(version=2).version == "2"


def test_exec_is_split_as_a_shell_does_and_expands_nothing():
    recipe = parse({"exec": "sh -c 'echo \"$HOME\" *' a\\ b"})
    assert recipe.exec_argv == ("sh", "-c", 'echo "$HOME" *', "a b")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", "golem.exec: must not be empty"),
        (" \t\n", "golem.exec: must not be empty"),
        ("a 'b", "golem.exec: cannot be split into words: no closing quotation"),
        ("a\\", "golem.exec: cannot be split into words: no escaped character"),
        ("'' a", "golem.exec: names no program"),
        ("a\0b", "golem.exec: must not contain a NUL character"),
        (["a"], "golem.exec: must be text, not a list"),
        (None, "golem.exec: must be text, not null"),
        (7, "golem.exec: must be text, not a number"),
    ],
)
def test_exec_refused(command, reason):
    assert golem_refusal(exec=command) == f"a.recipe: {reason}"


def test_folders_are_normalised():
    recipe = parse({"script": "./src//main/", "output": "out/./x", "log": "...", "payload": "päy"})
    assert (recipe.script, recipe.output, recipe.log) == ("src/main", "out/x", "...")


@pytest.mark.parametrize("field", ["script", "payload", "output", "log"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "must not be empty"),
        ("/etc", "must be relative"),
        ("a/../../b", "must not contain '..'"),
        ("..", "must not contain '..'"),
        (".", "not the pod itself"),
        ("./", "not the pod itself"),
        ("a\nb", "control characters"),
        ("\ud800", "not valid Unicode"),
        ("a\0b", "control characters"),
        ("x" * 256, "longer than 255 bytes"),
        (".run", "reserved"),
        ("a/index.dfs", "reserved"),
        (3, "must be text, not a number"),
        (None, "must be text, not null"),
    ],
)
def test_folders_refused(field, value, reason):
    text = golem_refusal(**{field: value})
    assert text.startswith(f"a.recipe: golem.{field}: ")
    assert reason in text


@pytest.mark.parametrize("field", ["output", "log"])
@pytest.mark.parametrize("folder", ["script", "script/x", "./script/"])
def test_results_stay_out_of_the_script_folder(field, folder):
    assert f"golem: {field} must not be the script folder" in golem_refusal(**{field: folder})


@pytest.mark.parametrize("field", ["output", "log"])
def test_the_script_folder_stays_out_of_the_results(field):
    text = golem_refusal(**{field: "out", "script": "out/code"})
    assert f"script must not lie inside the {field} folder" in text


def test_a_command_that_would_take_long_to_split_is_refused_before():
    assert parse({"exec": "x" * 65536}).exec_argv == ("x" * 65536,)
    assert "golem.exec: is longer than 64 KiB" in golem_refusal(exec="x" * 65537)


def runtime(**block):
    return parse({"runtime": {"image": "golem/x:latest", "budget": 1} | block}).runtime


def runtime_refusal(**block):
    with pytest.raises(RecipeError) as caught:
        runtime(**block)
    return str(caught.value).removeprefix("a.recipe: golem.runtime.")


def test_runtime_is_parsed():
    assert parse().runtime is None
    least = runtime()
    assert (least.image_is_hash, least.budget, least.foreach) == (False, 1.0, None)
    assert (least.timeout_s, least.poll_s, least.retries, least.workers) == (1800, 2, 2, 1)
    full = runtime(
        image="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376",
        timeout="1h30m",
        poll=0.5,
        offer_timeout="45s",
        capabilities=["vpn"],
        max_price={"start": 0, "cpu_hour": 0.1, "env_hour": 0.02},
        foreach="payload/./*.txt",
        workers=4,
    )
    assert full.image_is_hash
    assert (full.timeout_s, full.poll_s, full.offer_timeout_s) == (5400, 0.5, 45)
    assert (full.max_start, full.max_cpu_hour, full.max_env_hour) == (0, 0.1, 0.02)
    assert (full.capabilities, full.foreach, full.workers) == (("vpn",), "payload/*.txt", 4)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"image": 3}, "image: must be text, not a number"),
        ({"image": "a b"}, "image: String should match pattern"),
        ({"budget": True}, "budget: must be a number, not true or false"),
        ({"budget": 0}, "budget: Input should be greater than 0"),
        ({"timeout": "soon"}, "timeout: must be a duration like '45s', '30m' or '1h30m'"),
        ({"poll": 0}, "poll: Input should be greater than or equal to 0.1"),
        ({"foreach": "../*"}, "foreach: must not contain '..'"),
        ({"foreach": "/etc/*"}, "foreach: must be relative to the pod, not absolute"),
        ({"foreach": "*.txt"}, "foreach: must begin with a folder of the pod"),
        ({"foreach": "payload/a"}, "foreach: must be a pattern with *, ? or ["),
        ({"max_price": {"cpu": 1}}, "max_price.cpu: is not known"),
        ({"max_price": {"start": -1}}, "max_price.start: Input should be greater than or equal"),
        ({"capabilities": "vpn"}, "capabilities: must be a list, not text"),
        ({"capabilities": ["a)(b"]}, "capabilities.0: String should match pattern"),
        ({"capabilities": ["*"]}, "capabilities.0: String should match pattern"),
        ({"type": "!vm"}, "type: String should match pattern"),
        ({"type": ""}, "type: String should match pattern"),
        ({"workers": 0}, "workers: Input should be greater than or equal to 1"),
        ({"retries": "2"}, "retries: must be a whole number, not text"),
    ],
)
def test_runtime_errors_name_the_field(block, reason):
    assert runtime_refusal(**block).startswith(reason)
    assert golem_refusal(runtime=[1]) == "a.recipe: golem.runtime: must be an object, not a list"
    assert golem_refusal(runtime={"image": "x"}) == "a.recipe: golem.runtime.budget: is missing"


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("sh -c 'wc < {}'", "wc < {}"),
        ("sh -c 'wc {} > output/x' sh {}", "wc {} > output/x"),
        ("""sh -ec 'cat "{}"'""", 'cat "{}"'),
        ("bash -o pipefail -c -x {}", "{}"),
        ("/bin/sh -c {}", "{}"),
        ("env A=1 timeout 5 busybox sh -c ./{}", "./{}"),
        ("env -S 'sh -c wc${IFS}{}'", "sh -c wc${IFS}{}"),
        ("su x -c 'wc {}'", "wc {}"),
        ("python3 -u -W ignore -c 'open(\"{}\")'", 'open("{}")'),
        ("python3 -cprint({})", "-cprint({})"),
        ("perl -ne {}", "{}"),
        ("node --eval={}", "--eval={}"),
        ("awk -F , {} payload/x", "{}"),
        ("sed -n s,x,{}, payload/x", "s,x,{},"),
        ("sed -e s/x/{}/ payload/x", "s/x/{}/"),
        ("x 'a {}'", "a {}"),
        ("x a;{}", "a;{}"),
    ],
)
def test_a_files_name_is_never_a_piece_of_a_program(command, word):
    block = {"image": "x", "budget": 1, "foreach": "payload/*"}
    reason = golem_refusal(exec=command, runtime=block).removeprefix("a.recipe: golem: exec: ")
    assert reason.startswith(f"{{}} in '{word}' a file's name would be a piece of the program")
    assert reason.endswith("""pass it as an argument: sh -c '… "$1" …' sh {}""")
    del block["foreach"]
    assert parse({"exec": command, "runtime": block}).exec_argv[-1]


@pytest.mark.parametrize("command", ["sh -c 'cat payload/*'", "python3 -c 1", "awk 1", "sed p"])
def test_nor_does_it_take_the_place_of_one(command):
    reason = golem_refusal(
        exec=command, runtime={"image": "x", "budget": 1, "foreach": "payload/*"}
    )
    assert "exec: in the place of '" in reason


@pytest.mark.parametrize(
    "command",
    [
        *("""sh -c 'wc < "$1"' sh {}""", "sh -c 'x \"$@\"' sh {} output/{}.txt", "sh {}"),
        *(
            "sh script/run.sh -c {}",
            "wc -c {}",
            "grep -e x {}",
            "dd if={} of=output/x",
            "x --in={}",
        ),
        *("python3 -c 'import sys' {}", "python3 -m x {}", "python3 script/x.py -c {}", "{}"),
        *(
            "awk '{print}' {}",
            "sed -n 5p {}",
            "find payload -exec cat {} +",
            "perl -ne 1 {}",
            "x y",
        ),
    ],
)
def test_where_a_files_name_is_data(command):
    assert parse(
        {"exec": command, "runtime": {"image": "x", "budget": 1, "foreach": "payload/*"}}
    ).warnings in ((),)


def test_the_hint_for_a_shell_has_the_safe_form():
    block = {"image": "x", "budget": 1, "foreach": "payload/*"}
    (warning,) = parse({"exec": "wc {} > output/x", "runtime": block}).warnings
    assert warning.endswith("""if it is meant for a shell: sh -c '… "$1" …' sh {}""")


def test_capabilities_and_runtimes_as_golem_writes_them():
    names = ["!exp:gpu", "vpn", "inet", "manifest-support"]
    asked = runtime(type="vm-nvidia", capabilities=names)
    assert (asked.type, asked.capabilities) == ("vm-nvidia", tuple(names))
    assert runtime().type == "vm"


def test_unknown_keys_of_the_runtime_are_warned_about():
    recipe = parse({"runtime": {"image": "x", "budget": 1, "gpu": True}})
    assert recipe.extra == {"golem.runtime.gpu": True}
    assert recipe.warnings == ("a.recipe: golem.runtime.gpu: unknown key, kept",)


def test_unknown_keys_are_kept_and_warned_about():
    recipe = parse({"shell": 1}, colour="red")
    assert recipe.extra == {"colour": "red", "golem.shell": 1}
    assert recipe.warnings == (
        "a.recipe: colour: unknown key, kept",
        "a.recipe: golem.shell: unknown key, kept",
    )


def test_warnings_are_bounded():
    recipe = parse(**{f"k{n}": n for n in range(1000)})
    assert len(recipe.extra) == 1000
    assert len(recipe.warnings) == 11
    assert recipe.warnings[-1] == "a.recipe: and 990 more warnings"


def test_other_recipes_are_warned_about():
    data = json.dumps(BLENDER).encode()
    recipe = parse_recipe(data, file="a.recipe", others=["b.recipe", "c\n.recipe"])
    assert recipe.warnings == ("a.recipe: is used; there are other recipes: b.recipe, c\\n.recipe",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not JSON: Expecting value (line 1, column 1)"),
        (b"{", "is not JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
        (b"{}", "golem: is missing"),
        (b'{"golem": {}}', "golem.exec: is missing"),
        (b'{"golem": "x"}', "golem: must be an object, not text"),
        (b'{"golem": {"exec": "x"}, "public": "yes"}', "public: must be true or false, not text"),
        (b'{"golem": {"exec": "x"}, "name": "\\ud800"}', "name: is not valid Unicode text"),
        (b'{"golem": {"exec": "x", "exec": "y"}}', "the key 'exec' appears twice"),
        (b'{"golem": {"exec": "x"}, "a": NaN}', "NaN is not a number here"),
        (b'{"golem": {"exec": "x"}, "a": -Infinity}', "-Infinity is not a number here"),
        (b'{"golem": {"exec": "x"}, "a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": ' + b"[" * 400_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "is nested too deeply (more than 32 levels)"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text (byte 0)"),
        (b'{"\xe9": 1}', "is not UTF-8 text (byte 2)"),
        (b" " * (RECIPE_LIMIT_BYTES + 1), "is larger than 1024 KiB"),
        (b"\0" * 1000, "is not JSON"),
    ],
)
def test_hostile_input(data, reason):
    text = refusal(data)
    assert text.startswith(f"a.recipe: {reason}") or reason in text
    assert len(text) < 300


def test_bom_is_accepted():
    data = b"\xef\xbb\xbf" + json.dumps(BLENDER).encode()
    assert parse_recipe(data, file="a.recipe").name == "blender"


def test_several_problems_are_all_named():
    text = refusal('{"name": 1, "author": 2, "golem": {"exec": "x"}}')
    assert text == (
        "a.recipe: name: must be text, not a number; author: must be text, not a number"
    )


def test_very_many_problems_are_counted():
    text = golem_refusal(runtime=dict.fromkeys(["poll", "workers", "retries", "timeout"], "?"))
    assert "golem.runtime.image: is missing; golem.runtime.budget: is missing; " in text
    assert text.endswith(" (and 1 more)")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("make && ./run", "&&"),
        ("a || b", "||"),
        ("sort x | uniq", "|"),
        ("echo 'a b' > out", ">"),
        ("x 2>&1", "2>&1"),
        ("a ; b", ";"),
        ("a &", "&"),
        ("sh -c 'a && b | c > d; e'", None),
        ('sh -c "a \\" && b"', None),
        (r"find . -exec ls {} \;", None),
        ("expr 2 '>' 1", None),
        (r"expr 2 \> 1", None),
        ("a&&b", None),
        ("it\\'s && x", "&&"),
    ],
)
def test_what_is_meant_for_a_shell_is_warned_of(command, word):
    warnings = parse({"exec": command}).warnings
    expected = f"a.recipe: golem.exec: no shell runs it, so {word} is but an argument"
    assert [w.partition(";")[0] for w in warnings] == (
        [] if word is None else [expected.partition(";")[0]]
    )


def test_a_hostile_file_name_stays_on_one_line():
    assert refusal("{}", file="a\n\x1b[2J\udcff.recipe") == (
        "a\\n\\x1b[2J\\udcff.recipe: golem: is missing"
    )


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["golem", "exec"]), inner)
    ),
    max_leaves=10,
)


@given(
    st.binary(max_size=200)
    | _JSON.map(lambda v: json.dumps({"golem": v}).encode())
    | _JSON.map(lambda v: json.dumps({"golem": {"exec": "x", "log": v}}).encode())
)
def test_anything_is_a_recipe_or_a_one_line_error(data):
    problem = ""
    try:
        recipe = parse_recipe(data, file="a.recipe")
    except RecipeError as exc:
        problem = str(exc)
    else:
        assert recipe.exec_argv
        json.dumps(recipe.raw)
    assert problem == "" or (problem.isprintable() and problem.startswith("a.recipe: "))
