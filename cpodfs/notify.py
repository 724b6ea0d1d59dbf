"""Telling systemd: sd_notify(3), which is one datagram. A leaf."""

from __future__ import annotations

import os
import socket


def sd_notify(**fields: str) -> None:
    """Send ``READY=1``, ``STATUS=…`` and the like; nothing happens when systemd does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    text = "\n".join(f"{key}={value}" for key, value in fields.items())
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(text.encode(), address)
        except OSError:
            return  # systemd gone: nobody to tell
