from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpodfs.devnet.gftp import URL_PREFIX, GftpError, Registry, Server, main, serve
from cpodfs.devnet.run_env import HOOK_DIR, run_environment


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


def test_hook_imports_nothing_and_chains_to_the_next_sitecustomize(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.from_next = __file__")
    env = environment(tmp_path, PYTHONPATH=str(tmp_path))
    code = (
        "import sys; print(getattr(sys, 'from_next', None), 'yapapi' in sys.modules,"
        " 'asyncio' in sys.modules, sys.modules['sitecustomize'].__file__)"
    )
    expected = str(tmp_path / "sitecustomize.py")
    assert run_python(code, env) == f"{expected} False False {expected}"
