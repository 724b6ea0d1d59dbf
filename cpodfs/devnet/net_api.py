"""The Net API as far as yapapi asks it: networks, their addresses and nodes, TCP to what runs there.

Imports `agreements`, `pace`, `rest`. It keeps the books of a VPN, and carries what a requestor sends to a
port of a node and back, as messages of a WebSocket; the nodes cannot reach one another.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from cpodfs.devnet.agreements import new_id
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.rest import Json, Problem, body_object, text_field


@dataclass
class _Network:
    id: str
    net: ipaddress.IPv4Network | ipaddress.IPv6Network
    gateway: str | None
    addresses: set[str] = field(default_factory=set)
    nodes: dict[str, str] = field(default_factory=dict)
    """Node id to address."""

    def json(self) -> Json:
        found = {"id": self.id, "ip": str(self.net.network_address), "mask": str(self.net.netmask)}
        return {**found, "gateway": self.gateway}

    def claim(self, ip: str, node: str) -> str:
        """An address of this network that no other node has. Raises Problem.

        yapapi adds a node again and again to refresh it, and its own after its own address.
        """
        try:
            inside = ipaddress.ip_address(ip) in self.net
        except ValueError:
            raise Problem(400, f"{ip!r} is not an address") from None
        if not inside:
            raise Problem(400, f"{ip} is not in {self.net}")
        if any(other != node and taken == ip for other, taken in self.nodes.items()):
            raise Problem(409, f"{ip} is taken")
        return ip


Connector = Callable[[str, str, int], Awaitable[socket.socket | None]]
"""A connection to a port of the node that has an address in a network, by the network's id."""
_CHUNK = 1 << 16


class NetApi:
    def __init__(self, connect: Connector, pace: Pace) -> None:
        self._networks: dict[str, _Network] = {}
        self._connect = connect
        self._pace = pace

    def forget(self) -> None:
        """The daemon has restarted: networks are in its memory only."""
        self._networks.clear()

    def routes(self, root: str = "/net-api/v1") -> list[web.RouteDef]:
        one = f"{root}/net/{{id}}"
        return [
            web.get(f"{root}/net", self.list_networks),
            web.post(f"{root}/net", self.create),
            web.get(one, self.get),
            web.delete(one, self.remove),
            web.get(f"{one}/addresses", self.list_addresses),
            web.post(f"{one}/addresses", self.add_address),
            web.get(f"{one}/nodes", self.list_nodes),
            web.post(f"{one}/nodes", self.add_node),
            web.delete(f"{one}/nodes/{{node}}", self.remove_node),
            web.get(f"{one}/tcp/{{ip}}/{{port}}", self.connect),
        ]

    def _find(self, request: web.Request) -> _Network:
        network = self._networks.get(request.match_info["id"])
        if network is None:
            raise Problem(404, f"network {request.match_info['id']} is not known")
        return network

    async def create(self, request: web.Request) -> web.Response:
        body = await body_object(request)
        ip, mask = text_field(body, "ip"), body.get("mask")
        try:
            net = ipaddress.ip_network(
                f"{ip}/{mask}" if mask and "/" not in ip else ip, strict=False
            )
        except ValueError as error:
            raise Problem(400, str(error)) from None
        network = _Network(new_id(), net, body.get("gateway"))
        self._networks[network.id] = network
        return web.json_response(network.json())

    async def list_networks(self, _request: web.Request) -> web.Response:
        return web.json_response([network.json() for network in self._networks.values()])

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(self._find(request).json())

    async def remove(self, request: web.Request) -> web.Response:
        del self._networks[self._find(request).id]
        return web.json_response(None)

    async def list_addresses(self, request: web.Request) -> web.Response:
        return web.json_response([{"ip": ip} for ip in sorted(self._find(request).addresses)])

    async def add_address(self, request: web.Request) -> web.Response:
        network = self._find(request)
        network.addresses.add(network.claim(text_field(await body_object(request), "ip"), ""))
        return web.json_response(None)

    async def list_nodes(self, request: web.Request) -> web.Response:
        nodes = self._find(request).nodes.items()
        return web.json_response([{"id": node, "ip": ip} for node, ip in nodes])

    async def add_node(self, request: web.Request) -> web.Response:
        network, body = self._find(request), await body_object(request)
        node = text_field(body, "id")
        network.nodes[node] = network.claim(text_field(body, "ip"), node)
        return web.json_response(None)

    async def remove_node(self, request: web.Request) -> web.Response:
        network = self._find(request)
        if network.nodes.pop(request.match_info["node"], None) is None:
            raise Problem(404, f"node {request.match_info['node']} is not in this network")
        return web.json_response(None)

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """A WebSocket whose binary messages are what goes over a TCP connection."""
        network, ip = self._find(request), request.match_info["ip"]
        if not (port := request.match_info["port"]).isdecimal() or not 0 < int(port) < 65536:
            raise Problem(400, f"{port!r} is not a port")
        async with self._pace.at_provider():
            made = await self._connect(network.id, ip, int(port))
        if made is None:
            raise Problem(504, f"nobody answers at {ip}:{port}")
        reader, writer = await asyncio.open_connection(sock=made)
        try:
            answer = web.WebSocketResponse(max_msg_size=0)
            await answer.prepare(request)
            back = asyncio.create_task(self._bring(reader, answer))
            try:
                async for message in answer:
                    await self._pace.cross()
                    data = message.data
                    writer.write(data if isinstance(data, bytes) else str(data).encode())
                    await writer.drain()
            except ConnectionError:
                pass
            finally:
                back.cancel()
                await asyncio.wait([back])
        finally:
            writer.close()
        return answer

    async def _bring(self, reader: asyncio.StreamReader, answer: web.WebSocketResponse) -> None:
        """What the server says, until it is done."""
        try:
            while data := await reader.read(_CHUNK):
                await self._pace.cross()
                await answer.send_bytes(data)
        except ConnectionError:
            pass
        await answer.close()
