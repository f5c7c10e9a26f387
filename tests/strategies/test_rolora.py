import pytest
import torch

from strategies.rolora import rolora

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("round", range(6))
def test_even_rounds_move_b_and_odd_rounds_a_with_the_head_in_both(round):
    phase = rolora().phase(round)
    moving, still = ("layer.0.query.B", "layer.0.query.A") if round % 2 == 0 else ("layer.0.query.A", "layer.0.query.B")
    for predicate in (phase.trains, phase.shares):
        assert predicate(moving)
        assert predicate("head.weight")
        assert not predicate(still)
    assert not phase.keeps(still)


def test_b_comes_first_because_a_has_no_gradient_while_b_is_zero(federation, start):
    run = federation(rolora()).advance(1)
    assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in start.items() if name.endswith(".A"))
    assert all(run.state.tensors[name].norm() > 0 for name in start if name.endswith(".B"))


def test_the_factor_follows_the_round_and_not_how_often_a_client_took_part(federation):
    run = federation(rolora()).advance(1)
    late, _ = run.train(9)  # was never there before
    assert {name[-2:] for name in late.tensors if not name.startswith("head.")} == {".A"}


def test_the_factor_that_rests_keeps_its_bits(federation):
    run = federation(rolora())
    for round in range(4):
        resting = ".A" if round % 2 == 0 else ".B"
        before = {name: tensor.clone() for name, tensor in run.state.tensors.items() if name.endswith(resting)}
        run.take(run.play()[0])
        assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in before.items())


def test_an_adapter_without_pairs_is_refused():
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        rolora().init({"main": {"head.weight": torch.zeros(2, 3)}})
