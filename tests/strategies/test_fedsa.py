import pytest
import torch

from strategies.fedsa import fedsa_lora

pytestmark = pytest.mark.fast


def test_it_trains_everything_shares_a_alone_and_keeps_the_rest():
    phase = fedsa_lora().phase(0)
    for name, shared in {"layer.0.query.A": True, "layer.0.query.B": False, "head.weight": False, "layer.0.magnitude": False}.items():
        assert phase.trains(name)
        assert phase.shares(name) is shared
        assert phase.keeps(name) is not shared


def test_what_is_kept_comes_back_and_the_mean_of_a_lies_under_it(federation):
    run = federation(fedsa_lora())
    updates, trained = run.play((0, 1))  # of weight 1 and 2
    run.take(updates)
    for client in (0, 1):
        start = run.start(client)
        for name in start:
            if name.endswith(".A"):
                mean = (trained[0][name] + 2 * trained[1][name]) / 3
                assert torch.allclose(start[name], mean, rtol=0, atol=1e-15)
            else:
                assert torch.equal(start[name], trained[client][name])


def test_nothing_but_a_ever_reaches_the_server(federation, start):
    run = federation(fedsa_lora())
    for _ in range(3):
        updates, _ = run.play()
        assert {name[-2:] for update in updates for name in update.tensors} == {".A"}
        run.take(updates)
    assert all(torch.equal(run.state.tensors[name], tensor) for name, tensor in start.items() if not name.endswith(".A"))


def test_a_client_that_was_never_there_starts_from_zero_b_and_the_shared_a(federation):
    run = federation(fedsa_lora()).advance(3)
    new = run.start(9)
    assert new["layer.0.query.B"].abs().sum() == 0
    assert torch.equal(new["layer.0.query.A"], run.state.tensors["layer.0.query.A"])


def test_an_adapter_without_pairs_is_refused():
    with pytest.raises(ValueError, match=r"low-rank pairs.*adapter=lora"):
        fedsa_lora().init({"main": {"head.weight": torch.zeros(2, 3)}})
