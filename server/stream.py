"""Stream: the way down compressed. One public model for all clients; a round's change of it crosses the wire through a lossy codec.

A client's state is its version number: it is sent the changes since, or the whole where these are no shorter or not kept. What the codec
left out of a change lies in the next, which is the difference from what clients hold: nothing is lost for good.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedpeft.codecs.base import Codec, layout
from fedpeft.messages import Broadcast
from fedpeft.records import changed, difference, draw_down
from fedpeft.tensors import nbytes


@dataclass
class Stream:
    """The public model, its version, and the changes that led to it. `seed` is the run's."""

    codec: Codec
    seed: int
    version: int = -1
    public: Broadcast = field(default_factory=lambda: Broadcast({}))
    _changes: dict[int, bytes] = field(default_factory=dict)  # version -> the change from the version before
    _last: Broadcast | None = None

    def advance(self, broadcasts: Mapping[int, Broadcast]) -> Broadcast:
        """The public model that this round's clients start from.

        Raises `ValueError` where there is no one model that changes could be of.
        """
        distinct = {id(one): one for one in broadcasts.values()}
        model, *others = distinct.values()
        if others:
            raise ValueError("clients get models of their own (their ranks differ), a stream of changes is of one model; set downlink=raw")
        if model.base_delta:
            raise ValueError("this strategy adds to the base, a stream of changes is of the adapter's tensors; set downlink=raw")
        if model is self._last:  # the round is drawn again
            return self.public
        self._last, self.version = model, self.version + 1
        if layout(model.tensors) != layout(self.public.tensors):  # the first, or another adapter's
            self.public, self._changes = model, {}
            return self.public
        draw = draw_down(self.seed, self.version)
        self._changes[self.version] = self.codec.encode(difference(model.tensors, self.public.tensors), seed=draw)
        self.public = changed(self.public, self._changes[self.version], self.codec, draw)
        return self.public

    def since(self, version: int | None) -> list[bytes] | None:
        """The changes from `version` to now; None where the whole must be sent, or is no longer."""
        if version is None or any(step not in self._changes for step in range(version + 1, self.version + 1)):
            return None
        changes = [self._changes[step] for step in range(version + 1, self.version + 1)]
        return changes if sum(map(len, changes)) < nbytes(self.public.tensors) else None

    def resume(self, version: int, public: Broadcast) -> None:
        """Goes on from a checkpoint. Who is at an older version is sent the whole."""
        self.version, self.public, self._changes = version, public, {}
