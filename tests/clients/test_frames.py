"""A frame comes out as it went in; anything else ends the conversation."""

import socket
from collections.abc import Iterator

import pytest

from clients import frames


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one connection."""
    one, other = socket.socketpair()
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)  # all that a test says fits, so nobody waits
        other.settimeout(10)
        yield one, other


@pytest.mark.fast
@pytest.mark.parametrize("payload", [b"", b"\0\1\2", bytes(100_000)])
def test_head_and_payload_come_out_as_they_went_in(ends: tuple[socket.socket, socket.socket], payload: bytes) -> None:
    one, other = ends
    head = {"round": 3, "loss": 0.1 + 0.2, "text": "B\u00e4r", "whole": True, "none": None}
    frames.send(one, head, payload)
    assert frames.receive(other) == (head, payload)


@pytest.mark.fast
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        frames.LENGTHS.pack(frames.MAGIC, 10, 0) + b"{}",
        frames.LENGTHS.pack(frames.MAGIC, 2, 0) + b"[]",
        frames.LENGTHS.pack(frames.MAGIC, 2, 0) + b"{{",
        frames.LENGTHS.pack(frames.MAGIC, 2, 5) + b"{}abc",
        frames.LENGTHS.pack(frames.MAGIC, frames.MOST_HEAD + 1, 0),
        frames.LENGTHS.pack(frames.MAGIC, 2, frames.MOST_PAYLOAD + 1) + b"{}",
    ],
)
def test_what_is_no_whole_frame_is_refused_before_more_is_read(ends: tuple[socket.socket, socket.socket], said: bytes) -> None:
    one, other = ends
    one.sendall(said)
    one.close()
    with pytest.raises(frames.Hung):
        frames.receive(other)


@pytest.mark.fast
def test_a_frame_that_the_other_end_would_refuse_is_not_sent(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MOST_HEAD", 10)
    with pytest.raises(ValueError, match="at most 10"):
        frames.send(ends[0], {"text": "more than ten bytes"})


@pytest.mark.fast
def test_a_head_holds_nothing_but_json(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(TypeError):
        frames.send(ends[0], {"a": object()})
