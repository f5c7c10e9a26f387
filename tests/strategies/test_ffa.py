import pytest
import torch

from strategies.ffa import ffa_lora

pytestmark = pytest.mark.fast


def test_it_trains_and_shares_b_and_the_head_and_keeps_nothing():
    phase = ffa_lora().phase(0)
    for name, moves in {"layer.0.query.A": False, "layer.0.query.B": True, "head.weight": True, "layer.0.magnitude": True}.items():
        assert phase.trains(name) is moves
        assert phase.shares(name) is moves
        assert not phase.keeps(name)


def test_the_head_is_averaged_by_examples(federation):
    run = federation(ffa_lora())
    updates, trained = run.play((0, 1))  # of weight 1 and 2
    run.take(updates)
    want = (trained[0]["head.classifier.weight"] + 2 * trained[1]["head.classifier.weight"]) / 3
    assert torch.allclose(run.state.tensors["head.classifier.weight"], want, rtol=0, atol=1e-15)


def test_a_never_moves(federation, start):
    run = federation(ffa_lora()).advance(4)
    assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in start.items() if name.endswith(".A"))


def test_an_adapter_without_pairs_is_refused():
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        ffa_lora().init({"main": {"head.weight": torch.zeros(2, 3), "layer.0.bias": torch.zeros(3)}})
