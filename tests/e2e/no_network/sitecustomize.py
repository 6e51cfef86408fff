"""Ends a Python process that asks the network: put this file's folder on PYTHONPATH.

Python runs it before anything else, in every process that a run starts. An audit hook sees each
name that is resolved and each socket that is connected, or sent through, before that happens. What
it does not allow ends the process with `os._exit`, so that no library can catch it and go on.
Allowed are Unix sockets and the loopback. Code that speaks to the kernel itself is not seen; the
hub's fast downloader is such, but asks the hub through Python first.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import traceback
from typing import Any

STATUS = 97  # of the process that asked
MESSAGE = "the network was asked"
NAMES = {
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.getnameinfo",
}
ADDRESSES = {"socket.connect", "socket.sendto", "socket.sendmsg"}


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook. Returns for what is allowed, and for every event that is no network's."""
    if event in NAMES:
        host = args[0][0] if event == "socket.getnameinfo" else args[0]
        allowed = is_here(host)
    elif event in ADDRESSES:
        allowed = is_local(args[0], args[1])
    else:
        return
    if not allowed:
        asked = f"{MESSAGE}: {event} {args!r}\n{''.join(traceback.format_stack())}"
        os.write(2, asked.encode(errors="replace"))
        os._exit(STATUS)


def is_local(connected: socket.socket, address: Any) -> bool:
    """Whether a socket's peer is on this machine. None: a socket that was connected before."""
    if address is None or connected.family == socket.AF_UNIX:
        return True
    return isinstance(address, tuple) and is_here(address[0])


def is_here(host: object) -> bool:
    """Whether a name or number is the loopback's. No name (to listen at) is."""
    name = host.decode(errors="replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(name).split("%")[0]).is_loopback
    except ValueError:
        return False


sys.addaudithook(refuse)
