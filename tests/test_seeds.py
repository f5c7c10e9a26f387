import itertools
import random

import pytest
import torch

from fedpeft.seeds import SERVER, generator, numpy_generator, seed

pytestmark = pytest.mark.fast


def first(run=0, **what):
    return torch.rand(3, generator=generator(run, **what)).tolist()


def test_the_same_purpose_gives_the_same_draw():
    assert first(7, round=3, client=12, purpose="batches") == first(7, round=3, client=12, purpose="batches")


def test_run_round_client_and_purpose_each_change_the_draw():
    runs, rounds, clients, purposes = (0, 1), (-1, 0, 1, 11), (SERVER, 0, 1, 11), ("batches", "cohort 0", "cohort 1")
    keys = list(itertools.product(runs, rounds, clients, purposes))
    seeds = {seed(run, round=round, client=client, purpose=purpose) for run, round, client, purpose in keys}
    assert len(seeds) == len(keys)


def test_a_draw_does_not_depend_on_the_order_of_calls():
    keys = [(round, client) for round in range(3) for client in range(4)]
    one = {key: first(5, round=key[0], client=key[1], purpose="batches") for key in keys}
    random.Random(1).shuffle(keys)
    torch.manual_seed(99)  # nor on the global state
    assert {key: first(5, round=key[0], client=key[1], purpose="batches") for key in keys} == one


def test_a_draw_leaves_the_global_state_alone():
    torch.manual_seed(3)
    want = torch.rand(2).tolist()
    torch.manual_seed(3)
    generator(0, purpose="batches")
    assert torch.rand(2).tolist() == want


def test_digits_that_move_between_fields_do_not_collide():
    assert seed(1, round=23, client=4, purpose="x") != seed(1, round=2, client=34, purpose="x")
    assert seed(12, round=3, purpose="x") != seed(1, round=23, purpose="x")


def test_seeds_are_the_golden_ones():
    """Another value here means that no earlier run can be repeated or resumed: change it only with the format of checkpoints."""
    assert seed(0, purpose="x") == 2589272057753868395
    assert seed(7, round=3, client=12, purpose="batches") == 8640034512485908166
    assert seed(7, round=3, purpose="cohort 0") == 1792727878924225295


def test_draws_are_the_golden_ones():
    what = {"round": 3, "client": 12, "purpose": "batches"}
    assert torch.randint(1000, (5,), generator=generator(7, **what)).tolist() == [770, 574, 665, 305, 709]
    assert numpy_generator(7, **what).integers(1000, size=5).tolist() == [996, 13, 896, 535, 318]


@pytest.mark.parametrize("run", [0, 2**63, -5, 10**30])
def test_any_whole_number_is_a_run_and_gives_a_63_bit_seed(run):
    assert 0 <= seed(run, purpose="x") < 2**63
