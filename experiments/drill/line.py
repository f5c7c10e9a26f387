"""Line: what lies between one client and the server, which a drill can make slow."""

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread

PIECE = 65536  # bytes that go on at once, where the line is not slow


@dataclass(eq=False)
class Line:
    """Listens at a free port of this machine, and hands what comes there to port `server`, and what is answered back."""

    server: int
    rate: float | None = None  # bytes a second, from the client to the server; None: as fast as it comes
    _listening: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def __post_init__(self) -> None:
        Thread(target=self._listen, daemon=True).start()

    @property
    def port(self) -> int:
        """Where the client calls."""
        return int(self._listening.getsockname()[1])

    def close(self) -> None:
        """Takes no more calls."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.server))
                except OSError:
                    client.close()
                    continue
                Thread(target=self._join, args=(client, server), daemon=True).start()

    def _join(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = Thread(target=self._carry, args=(server, client, False), daemon=True)
            back.start()
            self._carry(client, server, True)
            back.join()

    def _carry(self, come: socket.socket, go: socket.socket, up: bool) -> None:
        try:
            while data := come.recv(PIECE if not up or self.rate is None else max(1, int(self.rate / 10))):
                go.sendall(data)
                if up and self.rate is not None:
                    time.sleep(len(data) / self.rate)
            go.shutdown(socket.SHUT_WR)
        except OSError:  # one end is gone: so is the other
            for end in (come, go):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
