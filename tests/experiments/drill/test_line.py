"""A line hands on every byte, both ways, and as slowly as it is told."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from experiments.drill.line import Line

pytestmark = pytest.mark.fast


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it got, once there is no more."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        caller, _ = listening.accept()
        with caller, caller.makefile("rb") as file:
            caller.sendall(file.read())

    threading.Thread(target=answer, daemon=True).start()
    yield listening.getsockname()[1]
    listening.close()


def sent_and_got(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as call, call.makefile("rb") as file:
        call.sendall(data)
        call.shutdown(socket.SHUT_WR)
        return file.read()


@pytest.mark.parametrize("rate", [None, 20_000.0])
def test_every_byte_goes_up_and_comes_back(rate: float | None, echo: int) -> None:
    line, data, began = Line(echo, rate), bytes(range(256)) * 40, time.monotonic()
    assert sent_and_got(line.port, data) == data
    assert time.monotonic() - began > (0 if rate is None else 0.9 * len(data) / rate)
    line.close()


def test_nobody_answers_where_the_server_is_gone_or_the_line_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()[1]
    line = Line(nobody)
    port = line.port
    assert sent_and_got(port, b"") == b""
    line.close()
    with pytest.raises(ConnectionRefusedError):
        sent_and_got(port, b"")
