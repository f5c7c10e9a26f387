"""Memory: what stays at a client between rounds, and its last reply.

New state and the reply to a broadcast are stored in one atomic step under (client, round, digest of the broadcast), and the version
before is kept until the next round. So the same broadcast again gives the same bytes, with nothing retrained and nothing spent twice; and a
server that resumes from its last checkpoint finds every client where it was.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeft.checkpoint import seal, unseal
from fedpeft.codecs.base import Payload
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Reply:
    """A reply as it was sent: payload, facts and metrics."""

    payload: Payload
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Memory:
    """The memory of the clients of one run, in `folder`/<client>.

    `replies`: also keep replies of rounds after which nothing stays at the client, and wait until the disk has each. Without it such a
    round is trained again when asked again, which gives the same bytes as long as its randomness comes from the run's seed.
    """

    folder: Path
    replies: bool = True

    def recall(self, client: int, adapter: str, round: int) -> Tensors:
        """What `client` keeps for `adapter` as of before `round`: memory belongs to one adapter, another's B is another thing.

        Raises `OSError` if that is forgotten, because the server went back by more than a round.
        """
        versions = self._versions(client)
        before = [version for version in versions if version.round < round]
        if versions and not before and versions[0].follows is not None:
            raise OSError(
                f"client {client} keeps rounds {versions[0].round} and later, what it kept before round {round} is forgotten; "
                "resume from a later checkpoint"
            )
        return before[-1].kept(adapter) if before else {}

    def answered(self, client: int, round: int, digest: str) -> Reply | None:
        """The reply to this very broadcast, if it was given before."""
        for version in self._versions(client):
            if version.round == round and version.digest == digest:
                return version.reply()
        return None

    def store(self, client: int, adapter: str, round: int, digest: str, kept: Tensors, reply: Reply) -> None:
        """Keeps state and reply of a round, then forgets all but this version and the one before it."""
        versions = self._versions(client)
        before = [version for version in versions if version.round < round]
        if not (kept or before or self.replies):
            return
        carried = before[-1].all_kept() if before else {}
        carried = {name: tensor for name, tensor in carried.items() if not name.startswith(f"{adapter}/")}
        tensors = carried | {f"{adapter}/{name}": tensor for name, tensor in kept.items()}
        tensors["reply"] = torch.frombuffer(bytearray(reply.payload.data or b"\0"), dtype=torch.uint8)
        follows = before[-1].round if before else None
        facts = {"header": reply.payload.header, "size": len(reply.payload.data), "facts": dict(reply.facts), "follows": follows}
        place = self.folder / f"{client:06d}"
        place.mkdir(parents=True, exist_ok=True)
        made = place / f"{round:06d}-{digest}.safetensors"
        seal(made, tensors, json.dumps(facts), synced=self.replies)
        stale = [version.path for version in versions if version.path != made and version not in before[-1:]]
        for path in [*stale, *place.glob("*.partial")]:
            path.unlink(missing_ok=True)

    def _versions(self, client: int) -> list["_Version"]:
        return [_Version(path) for path in sorted((self.folder / f"{client:06d}").glob("*.safetensors"))]


@dataclass(frozen=True)
class _Version:
    path: Path

    @property
    def round(self) -> int:
        return int(self.path.stem.partition("-")[0])

    @property
    def digest(self) -> str:
        return self.path.stem.partition("-")[2]

    @property
    def follows(self) -> int | None:
        """The round of the version before this one, forgotten or not; None if this is the first."""
        found: int | None = self._read()[1]["follows"]
        return found

    def all_kept(self) -> Tensors:
        return {name: tensor for name, tensor in self._read()[0].items() if name != "reply"}

    def kept(self, adapter: str) -> Tensors:
        start = f"{adapter}/"
        return {name.removeprefix(start): tensor for name, tensor in self.all_kept().items() if name.startswith(start)}

    def reply(self) -> Reply:
        tensors, facts = self._read()
        return Reply(Payload(facts["header"], tensors["reply"].numpy().tobytes()[: facts["size"]]), facts["facts"])

    def _read(self) -> tuple[Tensors, dict[str, Any]]:
        try:
            tensors, text = unseal(self.path)
            return tensors, json.loads(text)
        except ValueError as fault:
            raise OSError(
                f"this client's memory cannot be read: {fault}; "
                "delete the file to go on from the version before, which gives another result"
            ) from fault
