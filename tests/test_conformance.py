"""What every strategy must keep (design: algorithms 0.3). A new preset in `experiments/conf/strategy` is picked up by itself.

Compared is the model that clients get (products, base deltas included, and what is no part of them), not the factors: those are not unique.
An exception is declared below, with its reason.
"""

import json
from typing import Any

import pytest
import torch
from strategy_presets import NAMES, OWN_UPDATE, assert_same, strategy

from fedpeft.aggregate import median, trimmed_mean, weighted_mean
from fedpeft.checkpoint import classes_in, freeze, thaw
from fedpeft.codecs.raw import raw_bytes
from fedpeft.lowrank import LowRank, rank_of
from fedpeft.messages import Broadcast, Update, checked
from fedpeft.tensors import is_own

pytestmark = pytest.mark.fast
# What a rule does not fit, and why: (preset, round) or a whole preset.
NO_MODEL = "a round of gradients makes a sketch, not a model"
CUT = "the sparse change is cut to LoRA's rank"
EXCEPT_OWN_UPDATE = {("fed_sb gradient", 0): NO_MODEL, ("fed_sb gradient", 1): NO_MODEL, ("fed_sb sign", 0): NO_MODEL, ("slora", 0): CUT}
BY_NORM = {"hetlora"}  # whose clients count by the norm of their product, not by their examples
MAKES_A_ANEW = {"fedsvd"}  # the server changes what clients freeze, from what they send
ROUNDS = (0, 1, 2, 3)  # methods that alternate do so by the round

every = pytest.mark.parametrize("name", NAMES)
at = pytest.mark.parametrize("round", ROUNDS)


def bits(state: Any) -> tuple[dict[str, tuple], str]:
    tensors, skeleton = freeze(state)
    return {n: (t.dtype, tuple(t.shape), raw_bytes(t)) for n, t in tensors.items()}, json.dumps(skeleton)


def known(state: Any) -> dict[str, type]:
    """What a resumed run builds: the classes of a strategy's first state, and those of messages."""
    return {f"{cls.__module__}.{cls.__name__}": cls for cls in classes_in(state) | {Broadcast, LowRank}}


@every
@at
def test_one_client_gets_its_own_update_back(name, round, federation, distance):
    if (name, round) in EXCEPT_OWN_UPDATE:
        pytest.skip(EXCEPT_OWN_UPDATE[name, round])
    run = federation(strategy(name, **OWN_UPDATE.get(name, {}))).advance(round)
    updates, trained = run.play([2])
    want = run.model(2, trained[2])
    run.take(updates)
    assert_same(run.model(2), want, distance)


@every
@at
def test_identical_clients_get_that_clients_update(name, round, federation, distance):
    if (name, round) in EXCEPT_OWN_UPDATE:
        pytest.skip(EXCEPT_OWN_UPDATE[name, round])
    run = federation(strategy(name, **OWN_UPDATE.get(name, {})))
    for _ in range(round):
        run.take(run.play((0, 1, 2), seed=5)[0])
    updates, trained = run.play((0, 1, 2), seed=5)
    want = run.model(1, trained[1])
    run.take(updates)
    for client in (0, 1, 2):
        assert_same(run.model(client), want, distance)


@every
@at
def test_the_order_of_clients_changes_nothing(name, round, federation, distance):
    run = federation(strategy(name)).advance(round)
    updates, _ = run.play((0, 1, 2, 3))
    one, other = (federation(run.strategy, state=run.state, round=run.round) for _ in range(2))
    one.take(updates)
    other.take([updates[k] for k in (2, 0, 3, 1)])
    assert distance(one.model(), other.model()) <= 1e-10


@every
@at
@pytest.mark.parametrize("scale", [7.0, 1e-3])
def test_scaling_all_weights_changes_nothing(name, round, scale, federation, distance):
    run = federation(strategy(name)).advance(round)
    updates, _ = run.play()
    one, other = (federation(run.strategy, state=run.state, round=run.round) for _ in range(2))
    one.take(updates)
    other.take([Update(update.client, update.tensors, scale * update.weight) for update in updates])
    assert distance(one.model(), other.model()) <= 1e-10


@every
@at
def test_clients_count_by_their_weight(name, round, federation, distance):
    """A client of weight 2 is two clients of weight 1."""
    if name in BY_NORM:
        pytest.skip("its clients count by the norm of their product")
    run = federation(strategy(name)).advance(round)
    (a, b), _ = run.play((0, 1))
    one, other = (federation(run.strategy, state=run.state, round=run.round) for _ in range(2))
    one.take([Update(0, a.tensors, 1.0), Update(1, b.tensors, 2.0)])
    other.take([Update(0, a.tensors, 1.0), Update(1, b.tensors, 1.0), Update(2, b.tensors, 1.0)])
    assert distance(one.model(), other.model()) <= 1e-10


@every
@at
def test_frozen_tensors_keep_their_bits(name, round, federation):
    run = federation(strategy(name)).advance(round)
    phase, before = run.phase, run.start(0)
    _, trained = run.play([0])
    for tensor_name, tensor in before.items():
        if not phase.trains(tensor_name):
            assert torch.equal(trained[0][tensor_name], tensor)
    same = phase.adapter == run.strategy.phase(round + 1).adapter and phase.work == "train"
    if run.strategy.mean_only and same and name not in MAKES_A_ANEW:  # the server has nothing to change them by
        frozen = {n: t.clone() for n, t in run.strategy.broadcast(run.state, round, None).tensors.items() if not phase.shares(n)}
        run.take(run.play()[0])
        after = run.strategy.broadcast(run.state, round + 1, None).tensors
        assert all(torch.equal(after[n], t) for n, t in frozen.items() if not is_own(n))


@every
@at
def test_what_is_uploaded_is_what_was_declared(name, round, federation):
    run = federation(strategy(name)).advance(round)
    phase = run.phase
    (update,), _ = run.play([1])
    sent = run.strategy.broadcast(run.state, round, 1)
    assert {n for n in update.tensors if not is_own(n)} == {n for n in sent.tensors if phase.shares(n) and not is_own(n)}
    assert update.tensors  # a round in which nothing is sent is no round
    assert checked(update, sent, phase.shares, equal=run.strategy.mean_only) is update


@every
@at
def test_what_is_trained_is_shared_or_kept(name, round, federation):
    """What a client trains and neither sends nor keeps would be lost without a word."""
    run = federation(strategy(name)).advance(round)
    phase = run.phase
    if phase.finish is None:
        assert all(phase.shares(n) or phase.keeps(n) for n in run.start(0) if phase.trains(n))
        assert all(phase.trains(n) for n in run.start(0) if phase.shares(n) or phase.keeps(n))


@every
@at
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_clients_that_did_not_move_leave_the_model_where_it_was(name, round, dtype, tolerance, federation, distance):
    if (name, round) in EXCEPT_OWN_UPDATE and EXCEPT_OWN_UPDATE[name, round] == NO_MODEL:
        pytest.skip(NO_MODEL)
    run = federation(strategy(name), dtype)
    for _ in range(round):
        run.take(run.play(by=0.0)[0])
    before = [run.model(client) for client in (None, 0, 1)]
    run.take(run.play(by=0.0)[0])
    for want, client in zip(before, (None, 0, 1), strict=True):
        assert distance(run.model(client), want) <= tolerance


@every
@at
def test_a_state_survives_a_checkpoint_and_the_run_goes_on_to_the_same_bits(name, round, federation):
    first = federation(strategy(name))
    classes = known(first.state)
    run = first.advance(round + 1)
    tensors, skeleton = freeze(run.state)
    back = federation(strategy(name), state=thaw(tensors, json.loads(json.dumps(skeleton)), classes), round=run.round)
    assert bits(back.state) == bits(run.state)
    updates, _ = run.play()
    run.take(updates)
    back.take(updates)
    assert bits(back.state) == bits(run.state)


@every
@at
def test_the_same_inputs_give_the_same_bits_and_are_left_alone(name, round, federation):
    run = federation(strategy(name)).advance(round)
    updates, _ = run.play()
    before, sent = bits(run.state), [bits(update.tensors) for update in updates]
    states = [strategy(name).aggregate(run.state, round, iter(updates), weighted_mean) for _ in range(2)]
    assert bits(states[0]) == bits(states[1])
    assert bits(run.state) == before
    assert [bits(update.tensors) for update in updates] == sent


class Sealed:
    """Updates that only `mean` can open."""

    def __iter__(self):
        raise AssertionError("opened without mean")

    def __len__(self):
        raise AssertionError("counted without mean")


@every
@at
def test_a_strategy_that_says_mean_only_reads_updates_through_mean_alone(name, round, federation):
    run = federation(strategy(name)).advance(round)
    updates, _ = run.play()

    if not run.strategy.mean_only:
        with pytest.raises(AssertionError, match="without mean"):
            run.strategy.aggregate(run.state, round, Sealed(), lambda sealed: weighted_mean(list(sealed)))
        return
    answer, calls = weighted_mean(updates), []

    def mean(sealed):
        assert isinstance(sealed, Sealed)
        calls.append(sealed)
        return answer

    state = run.strategy.aggregate(run.state, round, Sealed(), mean)
    assert len(calls) == 1  # what noise hides once, a second look would show
    assert bits(state) == bits(run.strategy.aggregate(run.state, round, updates, weighted_mean))


@every
def test_no_config_can_switch_mean_only(name):
    assert isinstance(strategy(name).mean_only, bool)
    with pytest.raises(ValueError, match="mean_only"):
        strategy(name, mean_only=not strategy(name).mean_only)


@every
@pytest.mark.parametrize("mean", [median(), trimmed_mean(0.34)], ids=["median", "trimmed"])
def test_a_robust_mean_shrugs_off_one_hostile_client(name, mean, federation, distance):
    if not strategy(name).mean_only:
        pytest.skip("reads updates itself")
    run = federation(strategy(name), dtype=torch.float64)
    good, _ = run.play((0, 1, 2, 3), seed=5)
    hostile = Update(4, {n: t + 1e6 for n, t in good[0].tensors.items()}, 1.0)
    honest, attacked = (federation(run.strategy, state=run.state) for _ in range(2))
    honest.take(good, mean)
    attacked.take([*good, hostile], mean)
    assert distance(attacked.model(), honest.model()) <= 1e-12


@every
@at
def test_no_draw_comes_from_the_global_state(name, round, federation):
    run = federation(strategy(name)).advance(round)
    updates, _ = run.play()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = run.strategy.aggregate(run.state, round, updates, weighted_mean)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert bits(run.strategy.aggregate(run.state, round, updates, weighted_mean)) == bits(one)


@every
@at
def test_a_loss_term_runs_on_a_stack_of_clients(name, round, federation):
    """What training many clients at once needs: vmap over clients gives each client's own gradient."""
    run = federation(strategy(name)).advance(round)
    phase = run.phase
    if phase.loss is None:
        return
    starts = [run.start(client) for client in (0, 1, 2)]
    if len({rank_of(start) for start in starts}) > 1:
        return  # clients of one rank make a stack
    nows = [{n: t + torch.randn_like(t) for n, t in start.items() if phase.trains(n) and not is_own(n)} for start in starts]

    def stack(rows):
        return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}

    wave = torch.func.vmap(torch.func.grad(phase.loss))(stack(nows), stack(starts))
    for k in range(3):
        alone = torch.func.grad(phase.loss)(nows[k], starts[k])
        assert all(torch.allclose(wave[n][k], alone[n], rtol=0, atol=1e-12) for n in alone)
