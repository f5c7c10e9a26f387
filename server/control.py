"""Control: what a SuperLink's control port tells and takes of nodes, keys and runs.

By Flower's own client of it, without a process for each question; and Flower's commands print neither whose key a node has nor where a run
writes, which the port tells.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

from fedpeft.deployment import host_and_port
from server.certs import read_public_key

if TYPE_CHECKING:
    from flwr.proto.run_pb2 import Run as FlowerRun
    from flwr.supercore.control import ControlHttpClient

OVERRIDES = "overrides"  # the field of a run's config that holds its overrides; experiments/bundle/pyproject.toml has it, too
PLACE = "run.dir="
LAST = 20  # runs that are looked at


@dataclass(frozen=True)
class Node:
    """A client as the SuperLink knows it."""

    number: int
    name: str  # that its key was registered under; "" where none was
    status: str  # registered (and never seen), online, offline, unregistered
    key: bytes  # public, PEM


@dataclass(frozen=True)
class Run:
    """A run as the SuperLink knows it."""

    number: int
    status: str  # pending, starting, running, finished:completed, finished:failed, finished:stopped
    why: str  # it failed; "" otherwise
    folder: Path | None  # where it writes, without symbolic links; None: no run of ours

    @property
    def live(self) -> bool:
        """True until it has ended, as far as the SuperLink knows: of a ServerApp that was killed it hears a minute later."""
        return not self.status.startswith("finished")


@dataclass(frozen=True)
class Control:
    """The control port of one SuperLink. Every question raises `OSError` if nobody answers, or with what the SuperLink says."""

    port: "ControlHttpClient"
    address: str
    ca: Path | None

    def nodes(self) -> list[Node]:
        """All that were ever registered, or that connected where no keys are asked for."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._asking():
            found = self.port.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.name, node.status, bytes(node.public_key)) for node in found]

    def runs(self) -> list[Run]:
        """The last of ours, in the order of their beginning. No more: Flower writes to its database for each that has ended."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._asking():
            found = self.port.ListRuns(ListRunsRequest(limit=LAST)).run_dict
        made = [_run(run) for run in sorted(found.values(), key=lambda run: run.pending_at)]
        return [run for run in made if run.folder is not None]

    def run(self, number: int) -> Run:
        """One of them."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._asking():
            return _run(self.port.ListRuns(ListRunsRequest(run_id=number)).run_dict[number])

    def stop(self, number: int) -> None:
        """Ends a run; its folder has all rounds until then."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._asking():
            if not self.port.StopRun(StopRunRequest(run_id=number)).success:
                raise OSError(f"run {number} was not stopped")

    def register(self, public: Path) -> int:
        """Lets the owner of the public key in the file in; gives the number of its node."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        with self._asking():
            return int(self.port.RegisterNode(RegisterNodeRequest(public_key=key_of(public), name=public.stem)).node_id)

    def unregister(self, number: int) -> None:
        """Shuts a node out: its SuperNode ends, and its key stays out for as long as the database is kept."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._asking():
            self.port.UnregisterNode(UnregisterNodeRequest(node_id=number))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        import click
        from flwr.cli.utils import SUPERLINK_UNAVAILABLE_MESSAGE, flwr_cli_exc_handler

        causes: list[Exception] = []
        try:
            with flwr_cli_exc_handler(causes.append):
                yield
        except ValueError as fault:
            raise OSError(f"what answers at control={self.address} is no SuperLink: {fault}") from None
        except click.ClickException as fault:
            if fault.message != SUPERLINK_UNAVAILABLE_MESSAGE:
                raise OSError(f"the SuperLink at control={self.address}: {fault.message}") from None
            signed = f", and was its certificate signed by {self.ca}" if self.ca else ""
            raise ConnectionError(
                f"no SuperLink answers at control={self.address} ({causes[0]}): does `fedpeft server up` run, is this its control "
                f"address{signed}?"
            ) from None


@contextmanager
def control(address: str, ca: Path | None) -> Iterator[Control]:
    """The control port at `address`, over TLS that `ca` vouches for; None: without TLS. Raises `ConfigError` if that is no address."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

    host_and_port(address, "control")
    client = ControlHttpClient.from_server_address(
        address, insecure=ca is None, root_certificates=None if ca is None else ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )  # fmt: skip
    try:
        yield Control(client, address, ca)
    finally:
        client.close()


def key_of(public: Path) -> bytes:
    """The public key of a file as a SuperLink holds it: PEM. Raises `ValueError` if there is none in it."""
    return read_public_key(public).public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _run(run: "FlowerRun") -> Run:
    status, why = run.status, run.status.details.removeprefix("ServerApp failed with exception: ")
    told = f"{status.status}:{status.sub_status}" if status.sub_status else status.status
    try:
        words = shlex.split(run.override_config[OVERRIDES].string) if OVERRIDES in run.override_config else []
    except ValueError:  # another app's
        words = []
    places = [word.removeprefix(PLACE) for word in words if word.startswith(PLACE)]
    return Run(run.run_id, told, why, Path(places[-1]).resolve() if places else None)
