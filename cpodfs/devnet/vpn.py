"""How the market's VPN reaches a server in an activity: a connection made inside its network.

Standard library only. Every command of an activity has a network of its own, with nothing but a
loopback: whoever listens there is found by the mark in its environment, and connected to by a short
process that joins its network and hands the connection back. Blocks; call it in a thread.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_LISTENING = "0A"
_CONNECT_S = 10.0

_JOIN_AND_CONNECT = """
import ctypes, fcntl, os, socket, sys
pid, port, answer = map(int, sys.argv[1:])
NEWNET, NEWUSER, GET_USERNS = 0x40000000, 0x10000000, 0xB701
libc = ctypes.CDLL(None, use_errno=True)
def join(handle, flag):
    if libc.setns(handle, flag):
        raise OSError(ctypes.get_errno(), "setns")
def same(one, two):
    one, two = os.stat(one), os.stat(two)
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)
if not same(f"/proc/{pid}/ns/net", "/proc/self/ns/net"):
    net = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        join(net, NEWNET)
    except OSError:  # an ordinary user's: its owner's namespace comes first
        join(fcntl.ioctl(net, GET_USERNS), NEWUSER)
        join(net, NEWNET)
made = socket.create_connection(("127.0.0.1", port), 5)
made.settimeout(None)
socket.send_fds(socket.socket(fileno=answer), [b"x"], [made.fileno()])
"""


def connect(mark: bytes, port: int) -> socket.socket | None:
    """A connection to whatever marked process listens on a TCP port; None when none does.

    ``mark``: ``NAME=value`` as in its environment.
    """
    pid = next((pid for pid in _marked(mark) if _listens(pid, port)), None)
    if pid is None:
        return None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = (str(pid), str(port), str(theirs.fileno()))
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _JOIN_AND_CONNECT, *words],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_CONNECT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode != 0:
            return None
        _said, handles, _flags, _address = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=handles[0]) if handles else None


def _marked(mark: bytes) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                yield int(name)
        except OSError:
            continue


def _listens(pid: int, port: int) -> bool:
    """Whether somebody in a process's network listens on a port; on all addresses or loopback."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, _remote, state = line.split()[1:4]
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
