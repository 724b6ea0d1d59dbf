"""What a provider run asks the market for."""

from __future__ import annotations

import pytest
from yapapi.payload import vm
from yapapi.props.builder import DemandBuilder

from cpodfs.devnet.constraints import parse
from cpodfs.devnet.provider import ProviderSpec
from cpodfs.runs.provider import for_runtime

GPU = "!exp:gpu"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_demand_for_another_runtime_and_its_capabilities() -> None:
    asked = vm._VmConstraints(0.5, 2.0, 1, [GPU, "vpn"])
    package = for_runtime(vm._VmPackage("hash:sha3:x:http://x", asked), "vm-nvidia")
    demand = DemandBuilder()
    await package.decorate_demand(demand)
    wanted = parse(demand.constraints)
    plain = ProviderSpec("one").offer("0x1")
    gpu = plain | {"golem.runtime.name": "vm-nvidia"}
    assert not wanted.matches(plain)
    assert not wanted.matches(gpu)
    assert wanted.matches(gpu | {"golem.runtime.capabilities": ["vpn", GPU]})
    assert not wanted.matches(plain | {"golem.runtime.capabilities": ["vpn", GPU]})
    assert demand.properties["golem.srv.comp.task_package"] == "hash:sha3:x:http://x"
