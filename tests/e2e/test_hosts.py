"""Five hosts: network namespaces with addresses of their own, set up as docs/deploy.md says; one is cut off and comes back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.drill.event import SMALL, Event, read_ran
from experiments.drill.simulation import Simulation
from fedpeft.config import app_folder
from fedpeft.ledger import Ledger

NAME, ADDRESS = "fl.example.org", "10.0.0.5"  # of the server, as the page has them
NAMES = ("north", "south", "east", "west")
CUT = 2  # east's index
ROUNDS, DEADLINE = 8, 30  # a round takes 5 s here, on a busy machine 20 and more
RUN = [f"rounds={ROUNDS}", f"deadline={DEADLINE}", f"evaluate.every={ROUNDS}"]
SLOW = ("delay", "20ms", "5ms", "loss", "1%", "rate", "20mbit")  # a line from a clinic, in each direction
NARROW = ("rate", "20mbit", "burst", "64kb", "latency", "400ms")  # what a kernel without netem has of it
PAGE = (app_folder() / "docs" / "deploy.md").read_text()


@dataclass(frozen=True)
class Missed(Event):
    """What the hosts' run has missed: at each of `places`, (round, client), training raises."""

    places: frozenset[tuple[int, int]] = frozenset()

    def at(self, round: object, client: int) -> bool:
        """See `Event`."""
        return (round, client) in self.places


@dataclass(frozen=True)
class Network:
    """Hosts on one switch, which is a namespace as well: this machine's own network has no part in it."""

    folder: Path  # one below it for each host: its /srv/fedpeft
    tag: str = field(default_factory=lambda: f"fp{os.getpid()}")
    hosts: list[str] = field(default_factory=list)

    def space(self, host: str) -> str:
        return f"{self.tag}-{host}"

    def begin(self) -> None:
        _ip("netns", "add", self.space("switch"))
        self._switch("add", "br0", "type", "bridge")
        self._switch("set", "br0", "up")

    def add(self, host: str, address: str) -> None:
        """A host on a cable of its own, to which the server's name is known."""
        known = Path("/etc/netns") / self.space(host)
        known.mkdir(parents=True)
        (known / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {NAME}\n")
        _ip("netns", "add", self.space(host))
        self.hosts.append(host)
        self._switch("add", host, "type", "veth", "peer", "name", "eth0", "netns", self.space(host))
        self._switch("set", host, "master", "br0", "up")
        _ip("-n", self.space(host), "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.space(host), "link", "set", device, "up")
        (self.folder / host).mkdir(mode=0o700)

    def shape(self) -> str:
        """Makes every client's line slow, and lossy where the kernel can; says what it made of it."""
        made = []
        for host in self.hosts[1:]:
            for space, device in ((self.space(host), "eth0"), (self.space("switch"), host)):
                queue = ["tc", "-n", space, "qdisc", "add", "dev", device, "root"]
                for words in (("netem", *SLOW), ("tbf", *NARROW)):
                    if subprocess.run([*queue, *words], capture_output=True, check=False).returncode == 0:
                        made.append(" ".join(words))
                        break
        return ", ".join(dict.fromkeys(made)) or "as they are: this kernel has neither netem nor tbf"

    def plug(self, host: str, *, there: bool) -> None:
        """The cable between host and switch, pulled out or put back."""
        self._switch("set", host, "up" if there else "down")

    def call(self, host: str, command: str, code: int = 0) -> str:
        """What a command says that the page has, there."""
        assert command in PAGE, f"docs/deploy.md does not say `{command}`"
        done = subprocess.run(self.words(host, command), cwd=self.folder / host, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == code, f"{host}: {command}\n{done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def words(self, host: str, command: str) -> list[str]:
        program, *rest = command.split()
        return ["ip", "netns", "exec", self.space(host), str(Path(sys.executable).parent / program), *rest]

    def logs(self) -> str:
        return "".join(f"\n== {path}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*/state/*.log")))

    def end(self) -> None:
        """Takes all down, and what should still run in there with it, by its pid."""
        for host in [*self.hosts, "switch"]:
            found = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True, check=False)
            for pid in map(int, found.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", self.space(host)], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / self.space(host), ignore_errors=True)

    def _switch(self, *words: str) -> None:
        _ip("-n", self.space("switch"), "link", *words)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _all(hosts: Sequence[str], work: Callable[[str], object]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, hosts))


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Network(tmp_path)
    try:
        made.begin()
    except (OSError, subprocess.CalledProcessError) as fault:
        made.end()
        why = fault.stderr.decode().strip() if isinstance(fault, subprocess.CalledProcessError) else fault
        pytest.skip(f"no network namespaces here ({why}): they need iproute2 and root")
    try:
        yield made
    finally:
        made.end()


def written(network: Network) -> None:
    """The page's files at their hosts, for digits and one client more than two; keys, each made where it is used, and carried over."""
    server, site = (yaml.safe_load(block.split("```")[0]) for block in PAGE.split("```yaml\n")[1:3])
    server |= {"clients": len(NAMES), "run": [*SMALL, *RUN]}
    (network.folder / "server" / "server.yaml").write_text(yaml.safe_dump(server))
    network.call("server", f"fedpeft certs init certs --host {NAME} --host {ADDRESS}")
    (network.folder / "server" / "clients").mkdir()
    for client, host in enumerate(NAMES):
        del site["data"]  # every site has its share of the digits
        own = site | {"client": client, "whole": False, "engine": {"stacked": False}, "tls": site["tls"] | {"key": f"certs/{host}"}}
        site["data"] = {}
        (network.folder / host / "site.yaml").write_text(yaml.safe_dump(own))
    _all(NAMES, lambda host: _own_key(network, host))


def _own_key(network: Network, host: str) -> None:
    place, server = network.folder / host, network.folder / "server"
    subprocess.run(network.words(host, f"fedpeft certs client certs {host}"), cwd=place, check=True, capture_output=True)
    shutil.copy(server / "certs" / "ca.crt", place / "certs")
    shutil.copy(place / "certs" / f"{host}.pub", server / "clients")


def ledger(network: Network) -> list[dict[str, Any]]:
    found = list((network.folder / "server" / "state" / "runs").glob("*/ledger.jsonl"))
    return Ledger(found[0]).entries() if found else []


def until(met: Callable[[], bool], run: "subprocess.Popen[str]", network: Network, seconds: float = 300) -> None:
    """Waits for what has to come while the run goes on."""
    end = time.monotonic() + seconds
    while not met():
        assert run.poll() is None, f"the run ended: {run.stdout.read() if run.stdout else ''}{network.logs()}"
        assert time.monotonic() < end, f"it did not come within {seconds:.0f} s: {ledger(network)}{network.logs()}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_a_fault_until_it_is_back_and_the_adapter_is_that_of_the_simulation(
    network: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    network.add("server", ADDRESS)
    for number, host in enumerate(NAMES):
        network.add(host, f"10.0.0.{11 + number}")
    with capsys.disabled():
        print(f"\nlines of the hosts: {network.shape()}")
    written(network)
    assert network.call("server", "fedpeft server up").startswith("started: superlink, superexec;")
    _all(NAMES, lambda host: network.call(host, "fedpeft client up"))
    with subprocess.Popen(
        network.words("server", "fedpeft server run"),
        cwd=network.folder / "server",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            until(lambda: len(ledger(network)) > 0, run, network)
            network.plug(NAMES[CUT], there=False)
            until(lambda: any(entry["faults"] for entry in ledger(network)), run, network)
            network.plug(NAMES[CUT], there=True)
            until(lambda: len(ledger(network)) == ROUNDS, run, network)
            assert run.wait(60) == 0, network.logs()
        finally:
            run.kill()
    (there,) = (network.folder / "server" / "state" / "runs").iterdir()
    ran = read_ran(there)
    assert [entry["answers"] for entry in ran.entries] == [len(NAMES) - len(entry["faults"]) for entry in ran.entries]
    missed = sorted(round for round, client in ran.faults if client == CUT)
    assert ran.faults[missed[0], CUT] == f"no answer within {DEADLINE} s"
    assert missed[-1] < ROUNDS - 1, ran.faults  # it was back
    assert max(entry["answers"] for entry in ran.entries) == len(NAMES), ran.faults
    assert {reason for (_, client), reason in ran.faults.items() if client != CUT} <= {f"no answer within {DEADLINE} s"}

    # On a machine that is busy enough others are late as well: then they, too, are left out of the run that it is compared with.
    assert ran.end == Simulation(network.folder).run(Missed("raises", places=frozenset(ran.faults)), tuple(RUN)).end, ran.faults
    told = json.loads(
        subprocess.run(
            [*network.words("server", "fedpeft status -c server.yaml"), "--json"],
            cwd=network.folder / "server",
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    )
    assert (told["nodes"], told["clients"], told["round"]) == (len(NAMES), len(NAMES), ROUNDS)
    _all(NAMES, lambda host: network.call(host, "fedpeft client down"))
    network.call("server", "fedpeft server down")
