"""Which strategies are exact, proven on real models; and what those that mix ranks keep."""

import re

import pytest
import torch
from strategy_presets import MIXED, OWN_UPDATE, ROOT, assert_same, strategy

from fedpeft.adapters.lora import Lora
from fedpeft.lowrank import rank_of
from fedpeft.tensors import targets

pytestmark = pytest.mark.fast
# Of these the file says that they are exact; in rounds in which the base or the factors move.
EXACT = ("ffa", "rolora", "flora", "fedex", "fedsvd", "fed_sb", "ravan")
MIX = ("flexlora", "flora", "florist", "hetlora")
ROUNDS = (0, 1, 2, 3)

at = pytest.mark.parametrize("round", ROUNDS)


# Exactness


def ideal(run, updates, trained):
    """The weighted mean of the clients' own models, formed densely."""
    whole = sum(update.weight for update in updates)
    models = [(update.weight / whole, run.model(update.client, trained[update.client])) for update in updates]
    return {name: sum(p * model[name] for p, model in models) for name in models[0][1]}


def test_every_strategy_says_whether_it_is_exact():
    """The claim that the next test proves stands in the file; no other file makes it."""
    for path in sorted((ROOT / "strategies").glob("*.py")):
        says = bool(
            re.search(
                r'"""Exact[:,]|Exact, unless|(means|mean of each round|so means) (are|is) exact|so the mean of the products is',
                path.read_text(),
            )
        )
        assert says == (path.stem in EXACT) or path.stem == "__init__", path.stem


@pytest.mark.parametrize("kind", ["paper", "bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("name", EXACT)
@at
def test_an_exact_strategy_reaches_the_mean_of_the_products(name, kind, round, federation, distance):
    """Unequal weights; layers that are no square; GPT-2's stored transposed; Llama's grouped queries."""
    run = federation(strategy(name), kind=kind).advance(round)
    updates, trained = run.play((0, 1, 2, 3))
    want = ideal(run, updates, trained)
    run.take(updates)
    assert_same(run.model(), want, distance, 1e-10)


@pytest.mark.parametrize("name", ["flora", "fedex"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_a_model_moved_by_base_deltas_computes_what_the_mean_of_its_clients_weights_computes(name, kind, federation, tiny, batch):
    """The whole way, transposition included: logits of the shifted base against those of a base whose weights were moved by hand."""
    run = federation(strategy(name), kind=kind)
    for _ in range(2):
        run.take(run.play()[0])
    sent, base = run.strategy.broadcast(run.state, 2, None), tiny(kind)
    adapted = Lora(rank=3, alpha=4.5).attach(base, 0)
    adapted.fill(sent.tensors)
    with adapted.shifted(sent.base_delta):
        got = adapted.logits(batch(base))
    by_hand = tiny(kind)
    changes = run.model()
    own = dict(by_hand.module.named_parameters())
    with torch.no_grad():
        for layer in targets(sent.tensors):
            transposed = type(by_hand.module.get_submodule(layer)).__name__ == "Conv1D"
            own[f"{layer}.weight"].add_(changes[layer].T if transposed else changes[layer])
        for full, parameter in adapted.parameters.items():
            if full.startswith("head."):
                own[full.removeprefix("head.")].copy_(parameter)
    want = by_hand.module(**batch(by_hand)).logits
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


# Ranks of their own


@pytest.mark.parametrize("name", MIX)
@at
def test_clients_of_unequal_rank_get_their_rank(name, round, federation):
    run = federation(strategy(name, MIXED, **OWN_UPDATE.get(name, {}))).advance(round)
    for client, rank in enumerate(MIXED.ranks):
        assert rank_of(run.strategy.broadcast(run.state, round, client).tensors) == rank
    assert rank_of(run.strategy.broadcast(run.state, round, None).tensors) == 3
    same = [run.strategy.broadcast(run.state, round, client) for client in (1, 3)]
    assert same[0] is same[1]  # packed once for all clients of one rank


@pytest.mark.parametrize("name", MIX)
@at
def test_with_unequal_ranks_clients_that_did_not_move_leave_the_model_up_to_what_is_cut(name, round, federation, distance):
    """FLoRA's and FLoRIST's products begin at zero; FlexLoRA's and HetLoRA's low-rank clients send back less than the server has."""
    run = federation(strategy(name, MIXED, **OWN_UPDATE.get(name, {}))).advance(round)
    before = run.model()
    run.take(run.play((1, 3), by=0.0)[0])  # of full rank
    assert distance(run.model(), before) <= 1e-12


@at
def test_stacks_of_unequal_ranks_are_exact(round, federation, distance):
    run = federation(strategy("flora", MIXED)).advance(round)
    updates, trained = run.play((0, 1, 2, 3))
    want = ideal(run, updates, trained)
    run.take(updates)
    assert distance(run.model(), want) <= 1e-12
