"""ServerApp: config -> objects -> rounds, with a ledger line, an evaluation and a checkpoint after each."""

import logging
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft import checkpoint
from fedpeft.checkpoint import Checkpoint
from fedpeft.cohort import fixed
from fedpeft.config import Config, ConfigError, build, load, shown
from fedpeft.ledger import write_text
from fedpeft.lowrank import LowRank
from fedpeft.messages import Broadcast
from fedpeft.passport import Passport
from fedpeft.privacy.spending import Spending
from fedpeft.privacy.statement import Spent
from fedpeft.privacy.unit import Client
from fedpeft.records import digested
from fedpeft.setting import Setting, codec_of, downlink_of, open_setting, privacy_of, strategy_of
from fedpeft.strategy import Strategy
from fedpeft.tensors import Tensors, is_own
from server.canaries import Canaries
from server.card import card, spent_of, stated
from server.evaluate import Look, Measured, central, is_personal, personal
from server.exchange import Exchange, Traffic, connect
from server.export import export
from server.folder import Folder, alone, create, reopen, versions
from server.polling import Prompt
from server.private import Hidden
from server.rounds import Exhausted, Round, run
from server.sockets import Crossed, Crossing, fleet, unknown
from server.stream import Stream


@dataclass(frozen=True)
class Outcome:
    """What a run reached. Accuracies lie in [0, 1]; bytes are payloads of training messages, as they were counted."""

    zero_shot: float
    final: float
    loss: float
    measure: str  # of `final`: global or personal
    bytes_up: int
    bytes_down: int
    seconds: float  # of rounds, evaluations and checkpoints; of all sittings of a resumed run
    parameters: int  # entries of the adapter and the head
    epsilon: float | None  # spent by the client that spent most; None: no differential privacy
    stated: tuple[str, ...]  # what that means
    rounds: int  # that were run: fewer than were asked for if the privacy budget ended before

    def result(self, folder: Path, *, seconds: float, head_only: float | None = None) -> dict[str, Any]:
        """What result.json says of the run in `folder`, which took `seconds` in all; `head_only` is the accuracy of its baseline."""
        accuracy = {"zero_shot": self.zero_shot, "head_only": head_only, "final": self.final, "measure": self.measure}
        return {
            "accuracy": accuracy,
            "bytes": {"up": self.bytes_up, "down": self.bytes_down},
            "parameters": self.parameters,
            "seconds": seconds,
            "seconds_of_rounds": self.seconds,
            "epsilon": self.epsilon,
            "privacy": list(self.stated),
            "rounds": self.rounds,
            "run_dir": str(folder),
        }


log = logging.getLogger("fedpeft")
Entry = dict[str, Any]
Totals = dict[str, Any]


def federate(
    config: Config, setting: Setting, grid: Grid, folder: Folder, *, canaries: Canaries | None = None, look: Look | None = None,
    crossing: Crossing = unknown, accounts: Callable[[], Spent] | None = None,
) -> Generator[Entry, None, Outcome]:  # fmt: skip
    """Runs all rounds that `folder` has not yet, yielding each round's ledger entry, and exports the adapter.

    `look` is a quicker way to put a model through the test set, where clients and server share a process; `crossing` tells the bytes that
    crossed the clients' connections since it was called last; `accounts` reads the clients' own privacy ledgers, where these lie here:
    without them the server knows only what clients say in replies.

    A run that was killed at any moment ends with the same adapter: it goes on from its last whole checkpoint, and clients answer a
    broadcast they have seen with the bytes they gave before.
    """
    began = time.perf_counter()
    strategy: Strategy[Any] = strategy_of(config)
    (codec, _), down = codec_of(config), downlink_of(config)
    stream = None if down.lossless else Stream(down, config.seed)
    starts = setting.starts()
    known = frozenset(digested(starts.values()))
    exchange = connect(grid, codec, config.clients, deadline=config.deadline, seed=config.seed, stream=stream, starts=known,
                       needs=setting.passport)  # fmt: skip
    folder.note({"clients": _counted(exchange.passports.values())})
    first, state, totals = _start(config, setting, strategy, starts, folder, stream, look)
    hidden, mean, select = hidden_of(config, folder, canaries), build(config.mean), build(config.select)
    _check_accounts(first, spent_of(totals), hidden, accounts)
    folder.ledger.rewind(first)
    draw = fixed(config.clients, config.cohort, config.seed) if hidden is None else hidden.draw
    reached = first
    crossing()  # what came before the first round is of none
    try:
        for done in run(
            strategy, state, exchange, draw, mean, first=first, rounds=config.rounds, min_clients=config.min_clients, select=select,
            weights=config.weights or "examples", hidden=hidden,
        ):  # fmt: skip
            state, reached = done.state, done.round + 1
            crossed, evaluation = crossing(), Traffic()
            found = _evaluated(config, setting, strategy, done, exchange, evaluation, look)
            totals |= {name: totals[name] + more for name, more in (("up", done.traffic.up), ("down", done.traffic.down))}
            if (spent := done.spent if accounts is None else accounts()) is not None:
                totals |= vars(spent.most(spent_of(totals)))
            if found is not None:
                totals |= {"accuracy": found.accuracy, "loss": found.loss, "measure": found.of}
            now = time.perf_counter()
            totals, began = totals | {"seconds": totals["seconds"] + now - began}, now
            entry = _entry(done, found, evaluation, totals, crossed)
            folder.ledger.append(entry)
            kept = (state, None if stream is None else stream.public)
            facts = totals if stream is None else totals | {"version": stream.version}
            checkpoint.save(Checkpoint(done.round + 1, kept, facts), folder.checkpoints, keep=config.run.keep)
            yield entry
            crossing()  # nor are evaluations and polls between rounds
    except Exhausted as fault:
        if not reached:
            raise
        log.warning("stopped after round %d of %d: %s", reached, config.rounds, fault)
        spent = hidden.spent if hidden is not None else None if accounts is None else accounts()
        totals |= _final(setting, strategy, state, reached, look) | ({} if spent is None else vars(spent))
    last = strategy.broadcast(state, reached, None)
    export(setting, strategy.phase(reached).adapter, last, folder.adapter)
    text = card(config, setting, folder.adapter, zero_shot=totals["zero_shot"], final=totals["accuracy"], measure=totals["measure"],
                spent=spent_of(totals))  # fmt: skip
    write_text(folder.adapter / "README.md", text)
    return Outcome(
        zero_shot=totals["zero_shot"], final=totals["accuracy"], loss=totals["loss"], measure=totals["measure"], bytes_up=totals["up"],
        bytes_down=totals["down"], seconds=totals["seconds"],
        parameters=sum(tensor.numel() for name, tensor in last.tensors.items() if not is_own(name)), epsilon=totals["epsilon"],
        stated=() if (spent := spent_of(totals)) is None else tuple(stated(config, setting, spent)), rounds=reached,
    )  # fmt: skip


def _start(
    config: Config, setting: Setting, strategy: Strategy[Any], starts: Mapping[str, Tensors], folder: Folder, stream: Stream | None,
    look: Look | None,
) -> tuple[int, Any, Totals]:  # fmt: skip
    """(first round, state, totals): of the newest checkpoint, or of a run's beginning."""
    state = strategy.init(starts)
    if saved := checkpoint.found(folder.checkpoints):
        _check_same(folder.manifest(), _facts(setting))
        try:
            back = checkpoint.read(saved[-1], known_classes(state))
        except ValueError as fault:
            raise OSError(str(fault)) from fault
        state, public = back.state
        facts = dict(back.facts)
        if stream is not None:
            stream.resume(facts.pop("version"), public)
        return back.round, state, facts
    folder.note(_facts(setting))
    before = central(setting, strategy.phase(0).adapter, strategy.broadcast(state, 0, None), look)
    totals = {"up": 0, "down": 0, "seconds": 0.0, "zero_shot": before.accuracy, "accuracy": before.accuracy, "loss": before.loss}
    return 0, state, totals | {"measure": before.of, "measured": folder.manifest()["measured"], "epsilon": None}


def _counted(passports: Collection[Passport]) -> dict[str, dict[str, int]]:
    """How many clients said what of themselves; `examples` are powers of ten."""
    return {name: Counter(str(getattr(one, name)) for one in passports) for name in ("dtype", "rank", "examples")}


def _final(setting: Setting, strategy: Strategy[Any], state: Any, round: int, look: Look | None) -> Totals:
    """The metrics of a model that stopped before its last round."""
    found = central(setting, strategy.phase(round).adapter, strategy.broadcast(state, round, None), look)
    return {"accuracy": found.accuracy, "loss": found.loss, "measure": found.of}


def hidden_of(config: Config, folder: Folder, canaries: Canaries | None = None) -> Hidden | None:
    """The clients of the run, if they are hidden among each other."""
    unit = privacy_of(config)
    if not isinstance(unit, Client):
        return None
    return Hidden(unit, config.clients, config.cohort, config.rounds, config.seed, Spending(folder.path / "privacy.jsonl"), canaries)


def known_classes(state: Any) -> set[type]:
    """What a checkpoint of the strategy that begins in `state` may build."""
    return checkpoint.classes_in(state) | {Broadcast, LowRank}


def _facts(setting: Setting) -> dict[str, Any]:
    """What a run that goes on must find as it was. A digest of private data would tell whoever guesses them that he is right."""
    return {"fingerprint": setting.base.fingerprint} | ({} if setting.config.private else {"data": setting.data_digest})


def _check_same(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if a run is to go on with another base model, other data, or libraries that may give other bits."""
    for what, now in {**facts, "versions": versions()}.items():
        if (then := manifest.get(what)) != now:
            raise ConfigError(f"this run began with {what} {then}, here it is {now}; resume where both are the same, or begin another run")


def _check_accounts(first: int, before: Spent | None, hidden: Hidden | None, accounts: Callable[[], Spent] | None) -> None:
    """Raises `ConfigError` if a run is to go on with round `first` and less is on record than it had spent `before`."""
    if hidden is not None:
        hidden.check_resumed(first)
    if accounts is not None and before is not None and (now := accounts().epsilon) < before.epsilon:
        raise ConfigError(
            f"the checkpoint says that a client has spent epsilon {before.epsilon:.3f}, the clients' ledgers (memory/*/privacy.jsonl in "
            f"the run's folder) say {now:.3f}: what was spent is not known; put the run's own files back, or begin another run"
        )


def _evaluated(
    config: Config, setting: Setting, strategy: Strategy[Any], done: Round[Any], exchange: Exchange, traffic: Traffic, look: Look | None
) -> Measured | None:  # fmt: skip
    after, last = done.round + 1, done.round + 1 == config.rounds
    if after % config.evaluate.every and not last:
        return None
    if is_personal(strategy, done.state, done.round):
        return personal(strategy, done.state, after, range(config.clients) if last else done.cohort.clients, exchange, traffic)
    return central(setting, strategy.phase(after).adapter, strategy.broadcast(done.state, after, None), look)


def _entry(
    done: Round[Any], found: Measured | None, evaluation: Traffic, totals: Mapping[str, Any], crossed: Crossed | None
) -> Entry:  # fmt: skip
    return {
        "round": done.round,
        "clients": list(done.cohort.clients),
        "answers": done.answers,
        "faults": [{"client": fault.client, "reason": fault.reason} for fault in done.traffic.faults + evaluation.faults],
        "loss": done.loss if math.isfinite(done.loss) else None,
        "accuracy": None if found is None else found.accuracy,
        "test_loss": None if found is None else found.loss,
        "measure": None if found is None else found.of,
        "own_accuracy": None if found is None or totals["epsilon"] is not None else found.own,  # else weighted by counts of labels
        "bytes_up": done.traffic.up,
        "bytes_down": done.traffic.down,
        "bytes_raw_up": done.traffic.raw_up,
        "bytes_raw_down": done.traffic.raw_down,
        "entropy_up": None if done.traffic.entropy_up is None else round(done.traffic.entropy_up),  # bytes
        "bytes_by_client": {str(client): list(both) for client, both in done.traffic.clients.items()},
        "bytes_evaluation": evaluation.up + evaluation.down,
        "socket_up": None if crossed is None else crossed.up,
        "socket_down": None if crossed is None else crossed.down,
        "total_up": totals["up"],
        "total_down": totals["down"],
        "epsilon": totals["epsilon"],
        "delta": totals.get("delta"),
        "aggregation": done.gap.entry(),
        "aggregation_seconds": done.measuring,
        "round_seconds": done.seconds,
        "seconds": totals["seconds"],
    }


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A run on Flower's own engine: `flwr run . --run-config "overrides='rounds=5'"`."""
    overrides = shlex.split(str(context.run_config["overrides"]))
    config = load(overrides)
    if config.privacy.get("noise") == "seeded-insecure":
        raise ConfigError(
            "privacy.noise=seeded-insecure: every client knows the seed and could subtract the noise; it is for simulations alone"
        )
    if config.deadline is None:
        log.warning("deadline=null: a round waits for its slowest client, twelve hours at most; set deadline=SECONDS to go on without it")
    place = Path(config.run.dir or f"runs/flower-{context.run_id}")
    with alone(place, str(context.run_id)):
        _sit(grid, config, overrides, place)


def _sit(grid: Grid, config: Config, overrides: list[str], place: Path) -> None:
    """One sitting of the run in `place`: from its start, or from its last checkpoint, to its end."""
    if (place / "manifest.json").exists():
        folder, begun = reopen(place)
        if shown(begun) != shown(config):
            raise ConfigError(
                f"run.dir={place} holds a run with another config; choose another run.dir, or give the same overrides to go on with it"
            )
    else:
        folder = create(place, config, overrides)
    steps = federate(config, open_setting(config), Prompt(grid), folder, crossing=fleet())
    while True:
        try:
            entry = next(steps)
        except StopIteration as end:
            folder.write("result.json", end.value.result(place, seconds=end.value.seconds))
            print(
                f"fedpeft: accuracy {end.value.final:.4f}, {end.value.bytes_up} bytes up, {end.value.bytes_down} down, in {place}",
                flush=True,
            )
            return
        seen = [f"{name} {entry[name]:.4f}" for name in ("loss", "accuracy") if entry[name] is not None]
        print(f"fedpeft: round {entry['round'] + 1}/{config.rounds} {' '.join(seen)}", flush=True)
