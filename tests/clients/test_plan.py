"""Micro-batches cost least, waves are cut from sorted clients, and every sample and client is there once."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.plan import Plan, waves

pytestmark = pytest.mark.fast
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@given(lengths=LENGTHS, fixed=st.integers(1, 60))
def test_the_cut_is_the_cheapest_of_all_cuts_of_the_sorted_pool(lengths: list[int], fixed: int) -> None:
    ordered = sorted(lengths)
    best = min(
        sum(fixed + (b - a) * ordered[b - 1] for a, b in itertools.pairwise([0, *cuts, len(ordered)]))
        for many in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), many)
    )
    made = Plan(fixed=fixed, tokens=10**9).cut(torch.tensor(lengths))
    assert sum(fixed + len(cut) * max(lengths[at] for at in cut.tolist()) for cut in made) == best


@given(lengths=LENGTHS, tokens=st.integers(1, 100))
def test_every_sample_is_in_one_micro_batch_and_none_is_too_large(lengths: list[int], tokens: int) -> None:
    sizes = torch.tensor(lengths)
    made = Plan(fixed=8, tokens=tokens).cut(sizes)
    assert sorted(torch.cat(made).tolist()) == list(range(len(lengths)))
    assert all(len(cut) == 1 or len(cut) * int(sizes[cut].max()) <= tokens for cut in made)


@given(
    clients=st.sets(st.integers(0, 500), min_size=1, max_size=60), most=st.integers(1, 20), lanes=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_waves_hold_every_client_once_in_order_and_are_never_too_large(clients: set[int], most: int, lanes: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    work = {client: float(torch.randint(1, 100, (1,), generator=rng)) for client in clients}
    made = waves(list(clients)[::-1], work, most, lanes)
    assert [client for wave in made for client in wave] == sorted(clients)
    assert all(1 <= len(wave) <= most for wave in made)
    assert len(made) >= min(len(clients), lanes)
    assert made == waves(sorted(clients), work, most, lanes)


def test_waves_are_cut_where_the_work_is_even() -> None:
    assert waves([0, 1, 2, 3], {0: 90.0, 1: 30.0, 2: 30.0, 3: 30.0}, 8, 2) == [[0], [1, 2, 3]]
    assert waves([], {}, 8, 2) == []
