from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yapapi

from cpodfs.devnet.container import Container, ContainerError, Isolation
from cpodfs.devnet.gftp import URL_PREFIX, GftpError, Registry, Server, main, serve
from cpodfs.devnet.run_env import HOOK_DIR, run_environment
from cpodfs.devnet.transfer import Transfers
from cpodfs.runs import box, sandbox
from cpodfs.runs.spawn import How, program_start


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    found = Registry(tmp_path / "registry")
    yield found
    found.close()


def ask(server: Server, method: str, **params: Any) -> Any:
    request = {"jsonrpc": "2.0", "id": "7", "method": method, "params": params}
    answer = json.loads(server.answer(json.dumps(request)))
    assert answer["jsonrpc"] == "2.0"
    assert answer["id"] == "7"
    return answer.get("result", answer.get("error"))


def test_publish_resolve_close(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "a b.txt"
    file.write_text("x")
    server = Server(registry)
    assert ask(server, "version") == "0.7.3"
    [link] = ask(server, "publish", files=[str(file)])
    assert link["file"] == str(file)
    assert str(file) not in link["url"]
    found = registry.resolve(link["url"])
    assert (found.path, found.mode) == (file, "publish")
    assert ask(server, "close", urls=[link["url"], URL_PREFIX + "other"]) == ["ok", "error"]
    with pytest.raises(GftpError, match="not published"):
        registry.resolve(link["url"])


def test_receive_and_upload(registry: Registry, tmp_path: Path) -> None:
    server = Server(registry)
    target, source = tmp_path / "in", tmp_path / "out"
    source.write_text("result")
    link = ask(server, "receive", output_file=str(target))
    assert link["file"] == str(target)
    assert registry.resolve(link["url"]).mode == "receive"
    ask(server, "upload", file=str(source), url=link["url"])
    assert target.read_text() == "result"
    [published] = ask(server, "publish", files=[str(source)])
    refused = ask(server, "upload", file=str(source), url=published["url"])
    assert "cannot be written" in refused["message"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", -32600),
        ("[]", -32600),
        ('{"id": 1}', -32600),
        ('{"method": "format_disk", "id": 1}', -32601),
        ('{"method": ["x"], "id": 1}', -32601),
        ('{"method": "publish", "params": {"file": "x"}, "id": 1}', -32602),
        ('{"method": "publish", "params": {"files": ["/no/such/file"]}, "id": 1}', -32000),
        ('{"method": "receive", "params": {"output_file": "/no/such/dir/x"}, "id": 1}', -32000),
    ],
)
def test_bad_requests_get_an_error(registry: Registry, line: str, code: int) -> None:
    assert json.loads(Server(registry).answer(line))["error"]["code"] == code


@pytest.mark.parametrize(
    "url",
    [
        *("/etc/passwd", "gftp://local/", "gftp://other/abc", "gftp://local/../../etc/passwd"),
        *("gftp://local/.", "gftp://local/a.alive", "gftp://local/a/b", "file:///etc/passwd"),
    ],
)
def test_a_url_is_a_token_and_no_path(registry: Registry, url: str) -> None:
    with pytest.raises(GftpError):
        registry.resolve(url)


def test_registry_is_private(registry: Registry, tmp_path: Path) -> None:
    url = registry.add(tmp_path / "x", "publish")
    assert registry.folder.stat().st_mode & 0o777 == 0o700
    entry = registry.folder / url.removeprefix(URL_PREFIX)
    assert entry.stat().st_mode & 0o777 == 0o600


def test_everything_is_withdrawn_at_the_end(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    publish = {"jsonrpc": "2.0", "id": 1, "method": "publish"}
    line = json.dumps({**publish, "params": {"files": [str(tmp_path / "x")]}})
    answers = io.StringIO()
    serve(registry, io.StringIO(f"{line}\n\n{line}\n"), answers)
    assert len(answers.getvalue().splitlines()) == 2
    assert list(registry.folder.iterdir()) == []


def test_main_refuses_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CPODFS_GFTP_DIR", raising=False)
    assert main(["--version"]) == 0
    assert main(["publish"]) == 2
    assert main(["server"]) == 1
    assert "CPODFS_GFTP_DIR" in capsys.readouterr().err


def environment(tmp_path: Path, **base: str) -> dict[str, str]:
    base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **base}
    added = run_environment(
        market_url="http://127.0.0.1:9/",
        app_key="secret",
        tool_dir=tmp_path / "tool dir",
        gftp_dir=tmp_path / "gftp",
        base=base,
    )
    return {**base, **added}


def test_the_program_on_path_serves_and_dies_with_its_urls(tmp_path: Path) -> None:
    cwd = tmp_path / "pod"
    cwd.mkdir()
    (cwd / "json.py").write_text("raise SystemExit('imported from the pod')")
    (cwd / "data").write_text("x")
    with subprocess.Popen(
        ["gftp", "server"],
        cwd=cwd,
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(
            '{"jsonrpc": "2.0", "id": 1, "method": "publish", "params": {"files": ["data"]}}\n'
        )
        process.stdin.flush()
        [link] = json.loads(process.stdout.readline())["result"]
        provider_side = Registry(tmp_path / "gftp")
        assert provider_side.resolve(link["url"]).path == cwd / "data"
        process.kill()
        process.wait()
    with pytest.raises(GftpError, match="gone"):
        provider_side.resolve(link["url"])
    assert list(provider_side.folder.iterdir()) == []


def run_python(code: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_environment_for_a_requestor(tmp_path: Path) -> None:
    env = environment(tmp_path, PYTHONPATH="/somewhere")
    assert env["YAGNA_API_URL"] == "http://127.0.0.1:9"
    assert env["YAGNA_APPKEY"] == "secret"
    assert env["PYTHONPATH"] == f"{HOOK_DIR}:/somewhere"
    assert "secret" not in (tmp_path / "tool dir/bin/gftp").read_text()


def test_hook_changes_the_default_of_the_resolver_only(tmp_path: Path) -> None:
    code = (
        "from yapapi.payload import vm; import sys;"
        "print(vm.repo.__kwdefaults__['repository_url'], vm.DEFAULT_REPOSITORY_URL,"
        " any('_Hook' in repr(finder) for finder in sys.meta_path))"
    )
    url = "http://127.0.0.1:9/registry"
    assert run_python(code, environment(tmp_path)) == f"{url} {url} False"


RESOLVER = "from yapapi.payload import vm; print(vm.repo.__kwdefaults__['repository_url'])"


@pytest.mark.parametrize(
    "command",
    [
        'env PYTHONPATH=/elsewhere python3 -c "$CODE"',
        'PYTHONPATH= python -c "$CODE"',
        "unset PYTHONPATH; printf '%s' \"$CODE\" >x; sed -i '1i #!/usr/bin/env python3' x;"
        " chmod +x x; ./x",
        '. ./own/bin/activate; python3 -c "$CODE"',
        './own/bin/python -c "$CODE"',
    ],
)
def test_the_registry_is_found_where_a_script_has_its_own_python_or_path(
    tmp_path: Path, command: str
) -> None:
    venv.create(tmp_path / "own", symlinks=True)
    [packages] = (tmp_path / "own").glob("lib/python*/site-packages")
    ours = Path(yapapi.__file__).parents[1]
    (packages / "ours.pth").write_text(f"{ours}\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(tmp_path, PATH=path) | {"CODE": RESOLVER}
    shell = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(["/bin/sh", "-c", command], check=False, **shell)
    assert (done.stdout, done.stderr) == ("http://127.0.0.1:9/registry\n", "")


def test_python_is_the_next_one_on_the_path(tmp_path: Path) -> None:
    env = environment(tmp_path, PATH=str(Path(sys.executable).parent))
    python = tmp_path / "tool dir/bin/python3"
    code = "import sys; print(sys.executable, *sys.argv[1:])"
    words = [str(python), "-c", code, "a b", "*"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{Path(sys.executable).with_name('python3')} a b *\n"
    env["PATH"] = str(python.parent)
    done = subprocess.run([str(python)], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (127, "python3: not found\n")


def test_hook_imports_nothing_and_chains_to_the_next_sitecustomize(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.from_next = __file__")
    env = environment(tmp_path, PYTHONPATH=str(tmp_path))
    code = (
        "import sys; print(getattr(sys, 'from_next', None), 'yapapi' in sys.modules,"
        " 'asyncio' in sys.modules, sys.modules['sitecustomize'].__file__)"
    )
    expected = str(tmp_path / "sitecustomize.py")
    assert run_python(code, env) == f"{expected} False False {expected}"


# -- requestors in a sandbox ----------------------------------------------------------------------


class Boxed:
    """A sandboxed run: its pod, its box, and what it plants there."""

    def __init__(self, base: Path) -> None:
        self.market = Registry(base / "gftp")
        self.pod = base / "mount" / "pod"
        self.pod.mkdir(parents=True)
        self.path = Path(box.new(str(self.market.folder)))
        self.box = box.Box(str(self.path), [str(self.pod)])
        alive = os.open(self.path / "evil.alive", os.O_RDWR | os.O_CREAT)
        fcntl.flock(alive, fcntl.LOCK_EX)
        self.container = Container(base / "activity", Isolation(None), "x")
        self.container.create()
        self.container.path("/golem/work/in").write_text("from the provider")

    def plant(self, path: Path | str, mode: str, /, **more: Any) -> str:
        entry = {"path": str(path), "mode": mode, "publisher": "evil.alive", **more}
        (self.path / "token").write_text(json.dumps(entry))
        return f"{URL_PREFIX}{self.path.name}.token"

    async def read(self, path: Path | str) -> str:
        async with Transfers(self.market) as transfers:
            url = self.plant(path, "publish")
            await transfers.transfer(self.container, url, "container:/golem/work/out")
        return self.container.path("/golem/work/out").read_text()

    async def write(self, path: Path | str) -> None:
        async with Transfers(self.market) as transfers:
            url = self.plant(path, "receive")
            await transfers.transfer(self.container, "container:/golem/work/in", url)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def boxed(tmp_path: Path) -> Iterator[Boxed]:
    found = Boxed(tmp_path)
    yield found
    found.box.close()


@pytest.mark.anyio
async def test_a_sandboxed_program_may_offer_what_is_in_its_pod(boxed: Boxed) -> None:
    (boxed.pod / "payload").mkdir()
    for place in (boxed.pod / "payload" / "data", boxed.path / "tmp" / "data"):
        place.write_text("mine")
        assert await boxed.read(place) == "mine"
        await boxed.write(place)
        assert place.read_text() == "from the provider"


@pytest.mark.anyio
async def test_a_sandboxed_program_reaches_nothing_else(boxed: Boxed, tmp_path: Path) -> None:
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (boxed.pod / "folder").symlink_to(outside)
    (boxed.pod / "file").symlink_to(outside / "secret")
    os.mkfifo(boxed.pod / "pipe")
    ways = [
        *(outside / "secret", boxed.pod / ".." / ".." / "home" / "secret", boxed.pod),
        *(boxed.pod / "folder" / "secret", boxed.pod.parent / "pod2" / "x", "home/secret", "a\0b"),
        *(boxed.market.folder / "x", boxed.path / "token", f"{boxed.path}.note", "/", "\ud800"),
    ]
    for way in ways:
        with pytest.raises(ContainerError):
            await boxed.read(way)
        with pytest.raises(ContainerError):
            await boxed.write(way)
    for way in (boxed.pod / "file", boxed.pod / "pipe"):
        with pytest.raises(ContainerError):
            await boxed.read(way)
    await boxed.write(boxed.pod / "file")
    assert not (boxed.pod / "file").is_symlink()
    assert (outside / "secret").read_text() == "secret"
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_what_is_in_a_box_may_be_anything(boxed: Boxed) -> None:
    url = boxed.plant(boxed.pod / "x", "publish")
    entry = boxed.path / "token"
    assert boxed.market.resolve(url).path == boxed.pod / "x"
    for more in ({"publisher": "../x.alive"}, {"publisher": 1}, {"path": 1}, {"mode": []}):
        boxed.plant("/x", "publish", **more)
        with pytest.raises(GftpError, match="not published"):
            boxed.market.resolve(url)
    for text in ("[" * 20000, "[]", "", '{"path": "' + "x" * 40000):
        entry.write_text(text)
        with pytest.raises(GftpError, match="not published"):
            boxed.market.resolve(url)
    entry.unlink()
    entry.symlink_to("/etc/passwd")
    with pytest.raises(GftpError, match="not published"):
        boxed.market.resolve(url)
    entry.unlink()
    os.mkfifo(entry)
    with pytest.raises(GftpError, match="not published"):
        boxed.market.resolve(url)


def test_gftp_in_a_box_makes_urls_that_the_market_finds(boxed: Boxed) -> None:
    (boxed.pod / "x").write_text("x")
    server = Server(Registry(boxed.path))
    [link] = ask(server, "publish", files=[str(boxed.pod / "x")])
    assert boxed.market.resolve(link["url"]).path == boxed.pod / "x"
    assert ask(server, "close", urls=[link["url"]]) == ["ok"]
    with pytest.raises(GftpError, match="not published"):
        boxed.market.resolve(link["url"])


def test_a_box_ends_with_its_run(boxed: Boxed) -> None:
    url = boxed.plant(boxed.pod / "x", "publish")
    boxed.box.close()
    with pytest.raises(GftpError, match="gone"):
        boxed.market.resolve(url)
    assert list(boxed.market.folder.iterdir()) == []
    boxed.box = box.Box(str(boxed.path), [])


def test_boxes_of_supervisors_that_died_are_swept_away(boxed: Boxed) -> None:
    dead = Path(box.new(str(boxed.market.folder)))
    code = (
        f"import os; from cpodfs.runs import box; b = box.Box({str(dead)!r}, ['/x']); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dead.exists()
    box.Box(box.new(str(boxed.market.folder)), ["/x"]).close()
    assert sorted(boxed.market.folder.iterdir()) == [boxed.path, Path(f"{boxed.path}.note")]


def test_the_sandbox_shows_a_box_and_not_the_registry(tmp_path: Path) -> None:
    registry = str(tmp_path / "gftp")
    start = program_start(
        How(sandbox="bwrap"), tmp_path / "mount/pod", {"CPODFS_GFTP_DIR": registry}, {}
    )
    own = start["env"]["CPODFS_GFTP_DIR"]
    assert box.named(start["env"]) == own
    assert start["env"]["TMPDIR"] == f"{own}/tmp"
    assert own in start["wrap"]
    assert registry not in start["wrap"]
    assert sandbox.environment({"CPODFS_GFTP_DIR": registry})["CPODFS_GFTP_DIR"] != own
