"""Held: what the clients of this process hold of what came down, so that the server need not send it again.

Tensors by their digest, once for all clients; and where the way down is compressed the newest public model, which all clients of a process
reach by the same chain of changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from torch import Tensor

from fedpeft.codecs.base import Codec, Payload
from fedpeft.messages import Broadcast
from fedpeft.records import Packer, changed, draw_down, unpack_broadcast, unpack_changes


@dataclass(frozen=True)
class _Public:
    version: int
    broadcast: Broadcast
    store: Mapping[str, Tensor]  # by digest


@dataclass
class Held:
    """`downlink` is the codec of changes, `seed` the run's. With `keeps` False nothing is held between messages but `starts`."""

    downlink: Codec
    seed: int
    keeps: bool = True
    starts: Mapping[str, Tensor] = field(default_factory=dict)  # by digest: what every client makes for itself from config, seed and base
    _tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # client -> digest -> tensor of the broadcast it answered last
    _known: WeakValueDictionary[str, Tensor] = field(default_factory=WeakValueDictionary)  # the same tensors once for all clients
    _public: _Public | None = None
    _at: dict[int, int] = field(default_factory=dict)  # client -> version of the public model it holds

    def __contains__(self, client: int) -> bool:
        return client in self._tensors

    def of(self, client: int) -> Mapping[str, Tensor]:
        """The tensors that `client` holds, by digest."""
        return {**self.starts, **self._tensors.get(client, {})}

    def open(self, client: int, payload: Payload, facts: Mapping[str, object]) -> Broadcast | None:
        """The broadcast of a message to `client`; None if it leaves out what is not held here any more."""
        version, since = facts.get("version"), facts.get("since")
        store: dict[str, Tensor] = {}
        try:
            if type(since) is int and since >= 0:
                broadcast, store = self._changed(client, payload, since, str(facts.get("digest")))
            else:
                broadcast = unpack_broadcast(payload, self.of(client), store)
        except LookupError:
            return None
        if self.keeps:
            self._tensors[client] = {digest: self._known.setdefault(digest, tensor) for digest, tensor in store.items()}
            if type(version) is int:
                self._at[client] = version
                if self._public is None or self._public.version < version:
                    self._public = _Public(version, broadcast, store)
        return broadcast

    def _changed(self, client: int, payload: Payload, since: int, digest: str) -> tuple[Broadcast, dict[str, Tensor]]:
        """The public model after the changes of a message, which begin at version `since`; `LookupError` if this client is not there.

        A change that another client's message brought already is not made again.
        """
        public, changes = self._public, unpack_changes(payload)
        last = since + len(changes)
        if self._at.get(client) != since or public is None or not since <= public.version <= last:
            raise LookupError(f"client {client} holds version {self._at.get(client)}, the changes lead from {since} to {last}")
        for version in range(public.version + 1, last + 1):
            moved = changed(public.broadcast, changes[version - since - 1], self.downlink, draw_down(self.seed, version))
            public = _Public(version, moved, {})
        if not public.store:
            reached, store = Packer().store(public.broadcast)
            if reached != digest:
                raise LookupError("the changes do not lead to the server's model")
            public = replace(public, store=store)
        self._public = public
        return public.broadcast, dict(public.store)
