"""Which yagna runs talk to, and with what they pay there."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from cpodfs import words
from tests.mount.compute import DevnetMount, compute_pod, record, run_folders, run_to_end
from tests.mount.harness import Mount, Server, mounted, sh
from tests.mount.provider_pods import MarketMount, check_tidy, market_mounted, provider_pod
from tests.mount.strangers import reason, touch
from tests.mount.test_doctor import ME, yagna
from tests.patience import until

ASK = """import json, os, urllib.request as u
key = {'Authorization': 'Bearer ' + os.environ['YAGNA_APPKEY']}
print(u.urlopen(u.Request(os.environ['YAGNA_API_URL'] + '/me', headers=key)).read().decode())
print(json.dumps({n: v for n, v in os.environ.items() if n.startswith(('YAGNA_PAY', 'GSB_', 'CPODFS_GFTP'))}))
"""


def asked(mount: Mount) -> tuple[dict[str, str], dict[str, str]]:
    """What a requestor learns: who yagna says it is, and what its environment says of paying."""
    pod = compute_pod(mount, "asks", ["python3", "-c", ASK])
    folder = run_to_end(pod)
    assert record(folder)["exit_code"] == 0, (folder / "stderr.log").read_text()
    me, env = (folder / "stdout.log").read_text().splitlines()
    return json.loads(me), json.loads(env)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketMount]:
    with market_mounted(tmp_path_factory.mktemp("payment"), "one") as mount:
        yield mount


def test_a_session_is_told_of_the_test_network_of_today(market: MarketMount) -> None:
    _, env = asked(market)
    assert env.pop("CPODFS_GFTP_DIR")
    assert env == {"YAGNA_PAYMENT_DRIVER": "erc20", "YAGNA_PAYMENT_NETWORK": "hoodi"}


@pytest.mark.parametrize(
    ("number", "runtime", "said"),
    [
        (1, {"network": "mars"}, "yagna has no network 'mars' for erc20; it has holesky, hoodi, "),
        (2, {"driver": "zksync"}, "yagna has no payment driver 'zksync'; it has erc20"),
    ],
)
def test_what_yagna_does_not_have_refuses_the_touch(
    market: MarketMount, number: int, runtime: dict[str, str], said: str
) -> None:
    pod = provider_pod(market, f"lacks-{number}", "true", "", **runtime)
    assert "Invalid argument" in touch(pod)
    assert said in reason(pod)
    assert not (pod / "logs").exists()


def digits(amount: float) -> int:
    return len(Decimal(str(amount)).normalize().as_tuple().digits)


def test_what_a_run_costs_is_shown_with_four_digits_at_most(market: MarketMount) -> None:
    pod = provider_pod(market, "cost", "sh script/run.sh", "sleep 4")
    sh("touch .run", pod)
    seen: set[float] = set()

    def over() -> bool:
        with contextlib.suppress(FileNotFoundError, OSError):
            golem = json.loads((pod / ".run").read_text()).get("golem", {})
            rented = [one["spent"] for one in golem.get("providers", ())]
            seen.update(filter(None, [golem.get("spent"), *rented]))
        return not (pod / ".run").exists()

    until(over)
    assert seen
    assert max(map(digits, seen)) <= 4
    (folder,) = run_folders(pod)
    exact = check_tidy(market, folder)["golem"]["spent"]
    shown = market.cli("runs", str(pod)).stdout.splitlines()
    assert shown[0].split()[-3:] == ["providers", "GLM", "exit"]
    assert shown[1].split()[-3:] == ["1", words.cost(exact), "0"]
    assert digits(exact) > 4  # in the record nothing is lost


def test_the_recipes_network_goes_before_the_users(tmp_path: Path) -> None:
    with market_mounted(tmp_path, "one", "--network", "mars") as mount:
        pod = provider_pod(mount, "chosen", "true", "", network="amoy")
        assert check_tidy(mount, run_to_end(pod))["exit_code"] == 0
        session = compute_pod(mount, "session", "env")
        assert "Invalid argument" in touch(session)
        assert "no network 'mars'" in reason(session)


def test_a_yagna_that_does_not_answer_holds_no_touch_up(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is frozen: it is connected to, and says nothing."""
    monkeypatch.setenv("YAGNA_APPKEY", "key")
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        url = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        with mounted(tmp_path, server, None, "--yagna-url", url) as mount:
            folder = run_to_end(compute_pod(mount, "goes on", "env"))
            assert "YAGNA_PAYMENT_NETWORK=hoodi\n" in (folder / "stdout.log").read_text()


def asked_once(mount: DevnetMount) -> tuple[dict[str, str], dict[str, str]]:
    """What a program of a mount hears, which is there for that only."""
    try:
        mount.start()
        return asked(mount)
    finally:
        if mount.process is not None:
            mount.stop()


def test_a_yagna_of_ones_own_with_the_local_store(tmp_path: Path) -> None:
    with yagna(ME) as url:
        mount = DevnetMount(tmp_path, "--yagna-url", url, "--network", "polygon")
        mount.env |= {"YAGNA_APPKEY": "key", "GSB_URL": "unix:/none/yagna.sock"}
        me, env = asked_once(mount)
    assert me == {"identity": "0xabc"}
    assert env == {
        "GSB_URL": "unix:/none/yagna.sock",
        "YAGNA_PAYMENT_DRIVER": "erc20",
        "YAGNA_PAYMENT_NETWORK": "polygon",
    }


def test_a_variable_for_other_purposes_does_not_cost_money(tmp_path: Path) -> None:
    with yagna(ME) as url:
        mount = DevnetMount(tmp_path)
        mount.env |= {"YAGNA_API_URL": url, "YAGNA_APPKEY": "key"}
        me, env = asked_once(mount)
    assert me["identity"] != "0xabc"
    assert "CPODFS_GFTP_DIR" in env


@pytest.mark.sandbox
def test_the_socket_of_another_place_is_in_the_sandbox(tmp_path: Path, server: Server) -> None:
    place = tmp_path / "sockets"
    place.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "gsb"))
        listening.listen()
        with mounted(
            tmp_path, server, None, "--sandbox", "on", "--gsb-url", f"unix:{place}/gsb"
        ) as m:
            assert (
                record(run_to_end(compute_pod(m, "in", f"test -S {place}/gsb")))["exit_code"] == 0
            )
