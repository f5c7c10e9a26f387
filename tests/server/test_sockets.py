"""What crosses a port is what the kernel counted there, or nothing is said."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from server import sockets
from server.sockets import Crossed, Port

pytestmark = [pytest.mark.fast, pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much a connection carried")]


class Door:
    """A port of this machine, with a server behind it."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.number: int = self.door.getsockname()[1]

    def joined(self) -> tuple[socket.socket, socket.socket]:
        """A client's end of a new connection, and the server's."""
        client = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.number)))
        return client, self.stack.enter_context(self.door.accept()[0])


@pytest.fixture
def door() -> Iterator[Door]:
    with ExitStack() as stack:
        yield Door(stack)


def pass_on(source: socket.socket, to: socket.socket, size: int) -> None:
    source.sendall(bytes(size))
    while size:
        size -= len(to.recv(size))


def taken(port: Port, up: int, down: int) -> None:
    """Takes until so much has come: the last acknowledgement may be on its way when the bytes are there."""
    until, found = time.monotonic() + 10, Crossed(0, 0)
    while found != Crossed(up, down):
        more = port.take()
        assert more is not None
        found = Crossed(found.up + more.up, found.down + more.down)
        assert time.monotonic() < until, found
        time.sleep(0.001)


def test_every_byte_is_counted_once_and_in_its_direction(door: Door) -> None:
    client, server = door.joined()
    pass_on(client, server, 50)  # before anybody asks
    port = Port(door.number)
    taken(port, 0, 0)
    pass_on(client, server, 12_345)
    pass_on(server, client, 678)
    taken(port, 12_345, 678)
    assert port.take() == Crossed(0, 0)


def test_connections_come_and_go(door: Door) -> None:
    port = Port(door.number)
    first, second = door.joined(), door.joined()
    pass_on(*first, 1000)
    pass_on(*second, 300)
    taken(port, 1300, 0)
    pass_on(*second, 5)
    for end in (*first, *door.joined()):
        end.close()
    pass_on(*second, 5)
    taken(port, 10, 0)


def test_other_ports_are_not_counted(door: Door) -> None:
    with ExitStack() as stack:
        other = Door(stack)
        port = Port(door.number)
        door.joined()
        pass_on(*other.joined(), 100)
        assert port.take() == Crossed(0, 0)


def test_a_port_of_another_machine_is_not_said_to_have_carried_nothing(door: Door) -> None:
    port = Port(door.number)
    assert port.take() is None
    door.joined()
    assert port.take() == Crossed(0, 0)


def test_a_server_of_both_protocols_is_counted(door: Door) -> None:
    with ExitStack() as stack:
        try:
            both = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True))
        except OSError:
            pytest.skip("this machine has no IPv6")
        port = Port(both.getsockname()[1])
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port.number)))
        pass_on(client, stack.enter_context(both.accept()[0]), 77)
        taken(port, 77, 0)


def test_where_the_system_does_not_say_nothing_is_known(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = door.joined()
    pass_on(client, server, 10)
    port = Port(door.number)
    with monkeypatch.context() as elsewhere:
        elsewhere.delattr(socket, "AF_NETLINK")
        assert port.take() is None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sockets, "BY_FAMILY", 9999)  # a question the kernel refuses
        assert port.take() is None
    pass_on(client, server, 10)
    taken(port, 10, 0)


def test_the_port_is_the_one_that_server_up_named(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sockets.FLEET_PORT, raising=False)
    assert sockets.fleet()() is None
    monkeypatch.setenv(sockets.FLEET_PORT, str(door.number))
    crossing = sockets.fleet()
    client, server = door.joined()
    pass_on(client, server, 10)
    assert crossing() == Crossed(10, 0)
