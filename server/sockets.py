"""Sockets: bytes that cross the port at which clients call the server: payloads, and TLS, HTTP/2, gRPC, signatures and polls around them.

Linux counts them for each connection (TCP_INFO, which sock_diag(7) shows to everybody); of another system nothing is known. Each byte
counts once, however often it had to be sent; TCP's and IP's own headers do not, and another run of the same SuperLink at that time does.
What a connection carried between the last look at it and its end is missed: a second's worth, of connections that last for days.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

FLEET_PORT = "FEDPEFT_FLEET_PORT"  # of the environment that `fedpeft server up` gives to a run's ServerApp
EVERY = 1.0  # seconds between two looks; each takes less than a millisecond
PATIENCE = 5.0  # seconds the kernel may take to answer

# linux/inet_diag.h, linux/sock_diag.h, linux/tcp.h
SOCK_DIAG, BY_FAMILY, DUMP, END, FAULT, INFO = 4, 20, 0x301, 3, 2, 2
OPEN = sum(1 << state for state in (1, 4, 5, 8, 9, 11))  # established, or one side has closed; a listening socket carries nothing
COOKIE, ATTRIBUTES = 44, 72  # where they begin in a socket's message; the cookie is never given to another socket
ACKNOWLEDGED = 120  # where tcp_info says it, and what was received after it

Counts = dict[bytes, tuple[int, int]]  # connection -> bytes (up, down) since it began


@dataclass(frozen=True)
class Crossed:
    """Bytes from the clients (up) and to them (down)."""

    up: int
    down: int


Crossing = Callable[[], Crossed | None]


@dataclass(eq=False)
class Port:
    """The connections of this machine's TCP port `number`, as far as they are looked at."""

    number: int
    _seen: Counts = field(default_factory=dict)
    _up: int = 0
    _down: int = 0
    _known: bool = False  # a connection was seen: the port is this machine's
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._seen = connections(self.number) or {}  # what they carried before is nobody's here

    def take(self) -> Crossed | None:
        """What crossed since the last call; None if that is not known."""
        with self._lock:
            if not self._look():
                return None
            found, self._up, self._down = Crossed(self._up, self._down), 0, 0
            return found

    def watch(self) -> None:
        """Looks every second for as long as the process lives, so that of connections that close little is missed."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        never = threading.Event()
        while not never.wait(EVERY):
            with self._lock:
                self._look()

    def _look(self) -> bool:
        now = connections(self.number)
        if now is None:
            return False
        for key, (up, down) in now.items():
            before = self._seen.get(key, (0, 0))
            self._up, self._down = self._up + up - before[0], self._down + down - before[1]
        self._seen, self._known = now, self._known or bool(now)
        return self._known


def fleet() -> Crossing:
    """What crosses the fleet port of the SuperLink that this run is of, from now on; None where `fedpeft server up` did not start it."""
    said = os.environ.get(FLEET_PORT, "")
    if not said.isdigit():
        return unknown
    port = Port(int(said))
    port.watch()
    return port.take


def unknown() -> None:
    """Where nothing is measured."""


def connections(port: int) -> Counts | None:
    """Every open TCP connection of the local port; None where the system does not say."""
    if not hasattr(socket, "AF_NETLINK"):
        return None
    try:
        return _asked(port, socket.AF_INET) | _asked(port, socket.AF_INET6)  # a socket of both kinds is among the latter
    except OSError:
        return None


def _asked(port: int, family: int) -> Counts:
    ask = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 1 << (INFO - 1), OPEN) + struct.pack(">HH44x", port, 0)
    found: Counts = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as kernel:
        kernel.settimeout(PATIENCE)
        kernel.send(struct.pack("=IHHII", 16 + len(ask), BY_FAMILY, DUMP, 1, 0) + ask)
        while True:
            data = kernel.recv(1 << 17)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == END:
                    return found
                if kind == FAULT:
                    raise OSError("the kernel does not show its sockets")
                found |= _read(data[16:length])
                data = data[length + 3 & ~3 :]


def _read(message: bytes) -> Counts:
    at = ATTRIBUTES
    while at < len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if kind == INFO and length >= 4 + ACKNOWLEDGED + 16:
            down, up = struct.unpack_from("=QQ", message, at + 4 + ACKNOWLEDGED)
            return {message[COOKIE : COOKIE + 8]: (up, down)}
        at += length + 3 & ~3
    return {}
