"""Frames: one message between a ClientApp and its worker over a unix socket: a JSON head and bytes. The standard library alone."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

LENGTHS = struct.Struct("!4sIQ")  # magic, bytes of the head, bytes of the payload
MAGIC = b"fp1\n"
MOST_HEAD = 1 << 26  # bytes: a layout names every tensor, about 100 bytes each
MOST_PAYLOAD = (1 << 31) - 1  # bytes: Flower carries no more in one message
AT_ONCE = 1 << 20  # bytes read at once


class Hung(ConnectionError):
    """The other end closed the connection, or said what no frame says."""


def send(link: socket.socket, head: Mapping[str, Any], payload: bytes = b"") -> None:
    """Writes one frame. Raises `ValueError` for one that the other end would refuse."""
    text = json.dumps(head).encode()
    if len(text) > MOST_HEAD or len(payload) > MOST_PAYLOAD:
        raise ValueError(f"a message of {len(text)} + {len(payload)} bytes; at most {MOST_HEAD} + {MOST_PAYLOAD} go through the worker")
    link.sendall(LENGTHS.pack(MAGIC, len(text), len(payload)) + text)
    if payload:  # nothing may follow the last byte: who has read it closes
        link.sendall(payload)


def receive(link: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Reads one frame; `Hung` if there is no whole one."""
    magic, head, payload = LENGTHS.unpack(_exactly(link, LENGTHS.size))
    if magic != MAGIC or head > MOST_HEAD or payload > MOST_PAYLOAD:
        raise Hung(f"no frame begins with {magic!r} {head} {payload}")
    try:
        made = json.loads(_exactly(link, head))
    except (ValueError, RecursionError) as fault:
        raise Hung(f"the frame's head is no JSON: {fault}") from None
    if not isinstance(made, dict):
        raise Hung("the frame's head has no fields")
    return made, _exactly(link, payload)


def _exactly(link: socket.socket, size: int) -> bytes:
    whole = bytearray()  # grows with what comes, not with what was promised
    while len(whole) < size:
        part = link.recv(min(size - len(whole), AT_ONCE))
        if not part:
            raise Hung(f"the connection ended after {len(whole)} of {size} bytes")
        whole += part
    return bytes(whole)
