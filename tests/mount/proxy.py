"""A line to a server that breaks in the middle of a transfer, as networks do: with a reset.

Threads, sockets and nothing of ours. ``cut(up, down)`` resets the connection that carries the n-th
byte from now on in that direction, and every n-th after it; 0 never does. ``hold(n)`` lets n bytes of
answers through and then nothing until ``release()``.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from urllib.parse import urlsplit

from tests.mount.harness import Server

CHUNK = 1 << 14
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close sends RST."""


class Line(Server):
    """Another server's, as seen through the line."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._every = {"up": 0, "down": 0}
        self._seen = {"up": 0, "down": 0}
        self._live: set[socket.socket] = set()
        self.resets = 0
        self._room = 0
        self._flowing = threading.Event()
        self._flowing.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def control_headers(self) -> dict[str, str]:
        return self._server.control_headers()

    def cut(self, *, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self._every = {"up": up, "down": down}
            self._seen = {"up": 0, "down": 0}

    def hold(self, room: int) -> None:
        with self._lock:
            self._room = room
            self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    @property
    def is_holding(self) -> bool:
        return not self._flowing.is_set()

    def hang_up(self) -> None:
        """End the connections that there are: who waits for an answer need not any more."""
        with self._lock:
            for end in self._live:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        target = urlsplit(self._server.url)
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection((target.hostname, target.port))
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """One connection, in one thread: a socket that another thread reads from sends no reset."""
        with self._lock:
            self._live |= {client, server}
        try:
            self._copy(client, server)
        finally:
            with self._lock:
                self._live -= {client, server}
            client.close()
            server.close()

    def _copy(self, client: socket.socket, server: socket.socket) -> None:
        ways = {client: ("up", server), server: ("down", client)}
        with contextlib.suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    way, sink = ways[source]
                    data = source.recv(CHUNK)
                    if not data:
                        return
                    if self._is_cut(way, len(data)):
                        for end in ways:
                            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        return
                    if way == "down":
                        self._wait_for_room(len(data))
                    sink.sendall(data)

    def _wait_for_room(self, size: int) -> None:
        with self._lock:
            self._room -= size
            full = self._room < 0
        if full:
            self._flowing.wait()

    def _is_cut(self, way: str, size: int) -> bool:
        with self._lock:
            every = self._every[way]
            if not every:
                return False
            self._seen[way] += size
            if self._seen[way] < every:
                return False
            self._seen[way] = 0
            self.resets += 1
            return True
