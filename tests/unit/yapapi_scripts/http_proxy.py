"""A web server at a provider, asked through yapapi's own proxy and the VPN; its argument is a port."""

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta

import aiohttp
from yapapi import Golem
from yapapi.contrib.service.http_proxy import HttpProxyService, LocalHttpProxy
from yapapi.payload import vm
from yapapi.services import ServiceState

REMOTE_PORT = 8080
LIFE = timedelta(minutes=20)


class Web(HttpProxyService):
    def __init__(self):
        super().__init__(remote_port=REMOTE_PORT)

    @staticmethod
    async def get_payload():
        image = "16ad039c00f60a48c76d0644c96ccba63b13296d140477c736512127"
        return await vm.repo(image_hash=image, capabilities=[vm.VM_CAPS_VPN])

    async def start(self):
        async for script in super().start():
            yield script
        script = self._ctx.new_script(timeout=timedelta(minutes=1))
        serve = f"python3 -m http.server {REMOTE_PORT} </dev/null >/dev/null 2>&1 &"
        ready = f"until python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {REMOTE_PORT}))'"
        script.run("/bin/sh", "-c", f"echo hello > x.txt; {serve} {ready}; do sleep 0.1; done")
        yield script


async def main():
    async with Golem(budget=1.0, subnet_tag="public") as golem:
        network = await golem.create_network("192.168.0.1/24")
        expiration = datetime.now(UTC) + LIFE
        cluster = await golem.run_service(
            Web, network=network, num_instances=1, expiration=expiration
        )
        while cluster.instances[0].state != ServiceState.running:
            await asyncio.sleep(0.2)
        proxy = LocalHttpProxy(cluster, int(sys.argv[1]))
        await proxy.run()
        async with aiohttp.ClientSession() as web:
            found = []
            for path in ("x.txt", "none"):
                async with web.get(f"http://localhost:{sys.argv[1]}/{path}") as response:
                    found.append([response.status, await response.text()])
        print(json.dumps([found[0], found[1][0]]))
        await proxy.stop()
        cluster.stop()
        while any(one.is_available for one in cluster.instances):
            await asyncio.sleep(0.2)
        await network.remove()


if __name__ == "__main__":
    asyncio.run(main())
