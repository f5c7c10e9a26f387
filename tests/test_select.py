import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.aggregate import weighted_mean
from fedpeft.lowrank import product
from fedpeft.messages import Broadcast, Update
from fedpeft.select import everyone, krum, norm_bound
from fedpeft.tensors import Tensors, norm

pytestmark = pytest.mark.fast
EVERY = {"all": everyone(), "bound": norm_bound(1.0), "median bound": norm_bound(), "krum": krum(0.2), "multi-krum": krum(1, None)}


def heads(*values: float | list[float]) -> list[Update]:
    return [Update(k, {"head.weight": torch.tensor(v, dtype=torch.float64).reshape(-1)}, k + 1.0) for k, v in enumerate(values)]


def start(size: int = 1) -> Broadcast:
    return Broadcast({"head.weight": torch.zeros(size, dtype=torch.float64)})


def clients(updates: Iterator[Update]) -> list[int]:
    return [update.client for update in updates]


def drawn(seed: int) -> "Draw":
    return Draw(torch.Generator().manual_seed(seed))


class Draw:
    def __init__(self, rng: torch.Generator) -> None:
        self.rng = rng

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def pair(self, rank: int = 2) -> Tensors:
        return {"q.A": self(rank, 6), "q.B": self(5, rank)}

    def near(self, tensors: Tensors, by: float = 0.01) -> Tensors:
        return {name: tensor + by * self(*tensor.shape) for name, tensor in tensors.items()}

    def turn(self, tensors: Tensors) -> Tensors:
        """The same product of other factors."""
        Q = torch.linalg.qr(self(len(tensors["q.A"]), len(tensors["q.A"])))[0]
        return {"q.A": Q.T @ tensors["q.A"], "q.B": tensors["q.B"] @ Q}


# All selections


def test_everyone_passes_as_it_is():
    updates = heads(1.0, 5.0)
    assert list(everyone()(iter(updates), lambda client: start())) == updates


@pytest.mark.parametrize("select", EVERY.values(), ids=EVERY.keys())
def test_an_exception_at_the_end_passes_through(select):
    class TooFew(Exception):
        pass

    def arriving() -> Iterator[Update]:
        yield from heads(1.0, 2.0, 3.0, 4.0, 5.0)
        raise TooFew

    with pytest.raises(TooFew):
        list(select(arriving(), lambda client: start()))


@pytest.mark.parametrize("select", EVERY.values(), ids=EVERY.keys())
def test_the_input_is_read_to_its_end_and_left_as_it_was(select):
    updates, ended = heads(1.0, 2.0, 3.0, 40.0, 5.0), []

    def arriving() -> Iterator[Update]:
        yield from updates
        ended.append(True)

    made = list(select(arriving(), lambda client: start()))
    assert ended == [True]
    assert clients(iter(made)) == sorted(clients(iter(made)))
    assert [u.tensors["head.weight"].item() for u in updates] == [1, 2, 3, 40, 5]
    assert all(update.weight == update.client + 1 for update in made)


# The norm bound


def test_a_longer_update_is_shortened_over_all_its_tensors_together():
    sent = Broadcast({"q.A": torch.tensor([[1.0]]), "head.bias": torch.tensor([2.0])})
    long = Update(0, {"q.A": torch.tensor([[4.0]]), "head.bias": torch.tensor([6.0])}, 3.0, {"loss": 1.0})  # moved by (3, 4), of norm 5
    (made,) = norm_bound(2.5)([long], lambda client: sent)
    assert made.tensors["q.A"].tolist() == [[2.5]]  # 1 + 3 / 2
    assert made.tensors["head.bias"].tolist() == [4.0]  # 2 + 4 / 2
    assert (made.client, made.weight, made.metrics, made.tensors["q.A"].dtype) == (0, 3.0, {"loss": 1.0}, torch.float32)


def test_an_update_within_the_bound_is_the_same_object():
    (update,) = heads([3.0, 4.0])
    assert next(norm_bound(5.0)([update], lambda client: start(2))) is update


def test_without_a_bound_it_is_a_factor_of_the_rounds_median_norm():
    made = list(norm_bound()(heads(1.0, -2.0, 3.0, 100.0), lambda client: start()))  # norms 1, 2, 3, 100: twice 2.5
    assert [u.tensors["head.weight"].item() for u in made] == [1, -2, 3, 5]
    made = list(norm_bound(factor=0.5)(heads(2.0, -2.0, 8.0), lambda client: start()))
    assert [u.tensors["head.weight"].item() for u in made] == [1, -1, 1]


def test_if_most_clients_did_not_move_none_does():
    made = list(norm_bound()(heads(0.0, 0.0, 7.0), lambda client: start()))
    assert [u.tensors["head.weight"].item() for u in made] == [0, 0, 0]


def test_integers_stay_and_do_not_count():
    sent = Broadcast({"q.index": torch.tensor([0, 0]), "q.A": torch.zeros(1)})
    update = Update(0, {"q.index": torch.tensor([70, 7]), "q.A": torch.tensor([2.0])}, 1.0)
    (made,) = norm_bound(1.0)([update], lambda client: sent)
    assert made.tensors["q.index"] is update.tensors["q.index"]
    assert made.tensors["q.A"].tolist() == [1.0]


def test_a_client_that_pruned_is_compared_with_the_part_it_has_left():
    sent = Broadcast({"q.A": torch.tensor([[1.0, 1.0], [9.0, 9.0]]), "q.B": torch.tensor([[2.0, 9.0]])})
    update = Update(0, {"q.A": torch.tensor([[1.0, 4.0]]), "q.B": torch.tensor([[6.0]])}, 1.0)  # moved by 3 and by 4
    (made,) = norm_bound(2.5)([update], lambda client: sent)
    assert made.tensors["q.A"].tolist() == [[1.0, 2.5]]
    assert made.tensors["q.B"].tolist() == [[4.0]]


def test_each_client_is_compared_with_what_it_was_sent():
    sent = {0: Broadcast({"head.weight": torch.tensor([0.0])}), 1: Broadcast({"head.weight": torch.tensor([10.0])})}
    updates = [Update(k, {"head.weight": torch.tensor([5.0])}, 1.0) for k in sent]
    assert [u.tensors["head.weight"].item() for u in norm_bound(1.0)(updates, sent.__getitem__)] == [1, 9]


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), bound=st.floats(1e-3, 1e3))
def test_no_difference_is_longer_than_the_bound(values, bound):
    sent = Broadcast({"head.weight": drawn(0)(len(values))})
    (made,) = norm_bound(bound)(heads(values), lambda client: sent)
    assert norm({"": made.tensors["head.weight"] - sent.tensors["head.weight"]}) <= bound * (1 + 1e-6)


def test_with_a_bound_one_update_is_held_at_a_time():
    alive: weakref.WeakSet[Update] = weakref.WeakSet()
    before_next = []

    def arriving() -> Iterator[Update]:
        for client in range(5):
            before_next.append(len(alive))
            one = Update(client, {"head.weight": torch.tensor([3.0])}, 1.0)
            alive.add(one)
            yield one
            del one

    sent = Broadcast({"head.weight": torch.zeros(1)})
    assert weighted_mean(norm_bound(1.0)(arriving(), lambda client: sent))["head.weight"].tolist() == [1.0]
    assert max(before_next) == 1


def test_one_hostile_client_moves_the_bounded_mean_little():
    honest = heads(1.0, 1.0, 1.0, 1.0, -1e6)
    bounded = weighted_mean(norm_bound()([replace(u, weight=1.0) for u in honest], lambda client: start()))
    assert bounded["head.weight"].tolist() == [0.4]  # (4 * 1 - 2) / 5


# Krum


def test_krum_by_hand():
    # K = 5, f = 1: the two nearest others of 0, 1, 2, 4, 100 are 1 + 4, 1 + 1, 1 + 4, 4 + 9, 96^2 + 98^2 away.
    updates = heads(0.0, 1.0, 2.0, 4.0, 100.0)
    assert clients(krum(1)(updates, lambda client: start())) == [1]
    assert clients(krum(1, keep=2)(updates, lambda client: start())) == [0, 1]  # client 2 scores the same as 0
    assert clients(krum(1, keep=3)(updates, lambda client: start())) == [0, 1, 2]
    assert clients(krum(1, keep=None)(updates, lambda client: start())) == [0, 1, 2, 3]
    assert clients(krum(1, keep=9)(updates, lambda client: start())) == [0, 1, 2, 3]


def test_what_is_kept_is_not_changed():
    updates = heads(0.0, 1.0, 2.0, 4.0, 100.0)
    assert list(krum(1)(updates, lambda client: start())) == [updates[1]]


@pytest.mark.parametrize(
    ("share", "cohort", "f"), [(0.2, 10, 2), (0.2, 11, 3), (0.07, 100, 7), (0.0, 4, 0), (0, 4, 0), (2, 10, 2), (2.0, 10, 2)]
)
def test_a_share_is_rounded_up_and_a_number_from_1_on_is_a_count(share, cohort, f):
    kept = list(krum(share, keep=None)(heads(*(0.1 * k for k in range(cohort))), lambda client: start()))
    assert len(kept) == cohort - f


@pytest.mark.parametrize("kind", ["turned", "sheared"])
def test_a_client_whose_factors_are_rotated_is_no_outlier(kind):
    draw = drawn(0)
    common = draw.pair(3)
    honest = [draw.near(common) for _ in range(5)]
    mix = torch.linalg.qr(draw(3, 3))[0] if kind == "turned" else torch.eye(3, dtype=torch.float64) + draw(3, 3).triu(1)
    turned = {"q.A": torch.linalg.inv(mix) @ common["q.A"], "q.B": common["q.B"] @ mix}  # at the centre of the others, by its product
    bad = {name: -tensor if name == "q.B" else tensor for name, tensor in common.items()}
    updates = [Update(k, tensors, 1.0) for k, tensors in enumerate([*honest[:2], turned, bad, *honest[2:]])]
    sent = Broadcast(draw.near(common, 0.1))
    assert clients(krum(1, keep=1)(updates, lambda client: sent)) == [2]
    assert clients(krum(1, keep=None)(updates, lambda client: sent)) == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize("scale", [-1.0, 0.0, 20.0, 1e12])
@pytest.mark.parametrize("hostile", [[0], [4, 6]])
def test_hostile_clients_are_dropped(scale, hostile):
    draw = drawn(1)
    sent = draw.pair() | {"head.weight": draw(3, 5)}
    step = draw.near(sent, 0.5)
    each = [draw.turn(draw.near(step)) | {"head.weight": draw.near(step)["head.weight"]} for _ in range(8)]
    for k in hostile:
        each[k] |= {"q.B": scale * each[k]["q.B"], "head.weight": scale * each[k]["head.weight"]}
    updates = [Update(k, tensors, 1.0) for k, tensors in enumerate(each)]
    assert clients(krum(len(hostile), keep=None)(updates, lambda client: Broadcast(sent))) == [k for k in range(8) if k not in hostile]


@pytest.mark.parametrize("bad", [1e38, torch.finfo(torch.float32).max])
def test_values_that_overflow_only_hurt_their_sender(bad):
    draw = drawn(2)
    sent = {name: t.float() for name, t in ({"q.R": torch.zeros(2, 2)} | draw.pair()).items()}
    each = [{"q.R": (torch.eye(2) + 0.1 * draw(2, 2)).float()} for _ in range(6)]
    each[3] = {"q.R": torch.full((2, 2), bad)}
    updates = [Update(k, tensors, 1.0) for k, tensors in enumerate(each)]
    assert clients(krum(1, keep=None)(updates, lambda client: Broadcast(sent))) == [0, 1, 2, 4, 5]


def test_doubles_that_overflow_only_hurt_their_sender():
    draw = drawn(2)
    sent = draw.pair() | {"head.weight": draw(2)}
    each = [draw.near(sent) for _ in range(6)]
    each[3] = {name: torch.full_like(tensor, 1e200) for name, tensor in sent.items()}
    updates = [Update(k, tensors, 1.0) for k, tensors in enumerate(each)]
    assert clients(krum(1, keep=None)(updates, lambda client: Broadcast(sent))) == [0, 1, 2, 4, 5]


def slow_scores(changes: list[Tensor], f: int) -> list[float]:
    far = [sorted(float((a - b).square().sum()) for b in changes if b is not a) for a in changes]
    return [sum(row[: len(changes) - f - 2]) for row in far]


@settings(deadline=None, max_examples=40)
@given(cohort=st.integers(4, 9), seed=st.integers(0, 999), kind=st.sampled_from(["AB", "B", "R", "H", "ranks"]))
def test_krum_is_that_of_the_dense_changes(cohort, seed, kind):
    draw = drawn(seed)
    whole = {"AB": {}, "B": {}, "ranks": {}, "R": {"q.R": draw(4, 4)}, "H": {"q.H": draw(2, 2, 2)}}[kind] | draw.pair(4)
    whole |= {"head.weight": draw(2, 3), "head.bias": draw(2), "control/q.A": draw(4, 6), "control/q.B": draw(5, 4)}
    ranks = [1 + k % 4 if kind == "ranks" else 4 for k in range(cohort)]

    def sent(client: int) -> Broadcast:
        rank = ranks[client]
        return Broadcast(whole | {"q.A": whole["q.A"][:rank], "q.B": whole["q.B"][:, :rank]})

    moves = {"AB": ("A", "B"), "ranks": ("A", "B"), "B": ("B",), "R": ("R",), "H": ("H",)}[kind]
    up = [*(f"q.{part}" for part in moves), "head.weight", "head.bias", "control/q.A", "control/q.B"]
    updates = [Update(k, draw.near({name: sent(k).tensors[name] for name in up}, 1.0), 1.0) for k in range(cohort)]
    changes = []
    for update in updates:
        old, new = sent(update.client).tensors, sent(update.client).tensors | update.tensors
        parts = [product(new, "q").dense() - product(old, "q").dense(), *(new[n] - old[n] for n in ("head.weight", "head.bias"))]
        changes.append(torch.cat([part.flatten() for part in parts]))
    scores = slow_scores(changes, 1)
    best = sorted(range(cohort), key=lambda k: (round(scores[k], 6), k))
    for keep in (1, 2, cohort - 1):
        assert clients(krum(1, keep)(updates, sent)) == sorted(best[:keep])


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(6)), keep=st.sampled_from([1, 3, None]))
def test_krum_does_not_depend_on_who_was_fast(order, keep):
    draw = drawn(3)
    sent = Broadcast(draw.pair() | {"head.weight": draw(4)})
    updates = [Update(k, draw.near(sent.tensors, 1.0), 1.0) for k in range(6)]
    made = list(krum(3, keep)([updates[k] for k in order], lambda client: sent))  # f = 3: one neighbour, so two nearest others are a tie
    assert made == list(krum(3, keep)(updates, lambda client: sent))


def test_clients_of_a_smaller_rank_are_not_dropped_for_it():
    draw = drawn(4)
    whole = draw.pair(4)
    sent = [Broadcast({"q.A": whole["q.A"][:r], "q.B": whole["q.B"][:, :r]}) for r in (4, 4, 4, 4, 4, 1, 4)]
    each = [draw.near(one.tensors) for one in sent]  # values of rank 1 are far from those of rank 4, what was learned is not
    each[2] = {"q.A": each[2]["q.A"], "q.B": each[2]["q.B"] + 0.3}
    updates = [Update(k, tensors, 1.0) for k, tensors in enumerate(each)]
    assert clients(krum(1, keep=None)(updates, sent.__getitem__)) == [0, 1, 3, 4, 5, 6]


def test_a_factor_that_is_not_uploaded_is_the_broadcasts():
    A = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # the second column of B has no effect
    sent = Broadcast({"q.A": A, "q.B": torch.zeros(1, 2)})
    rows = [[0.0, 900.0], [1.0, 0.0], [2.0, -900.0], [4.0, 0.0], [100.0, 0.0]]
    updates = [Update(k, {"q.B": torch.tensor([row])}, 1.0) for k, row in enumerate(rows)]
    assert clients(krum(1)(updates, lambda client: sent)) == [1]
    assert clients(krum(1, None)(updates, lambda client: sent)) == [0, 1, 2, 3]


def test_where_only_a_is_shared_the_as_are_compared():
    sent = Broadcast({"q.A": torch.zeros(1, 2), "q.B": torch.zeros(3, 1)})  # FedSA: the server's B stays at its start, zero
    rows = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [100.0, 0.0]]
    updates = [Update(k, {"q.A": torch.tensor([row])}, 1.0) for k, row in enumerate(rows)]
    assert clients(krum(1)(updates, lambda client: sent)) == [1]
    assert clients(krum(1, None)(updates, lambda client: sent)) == [0, 1, 2, 3]


def test_what_only_a_strategy_reads_and_integers_are_not_compared():
    sent = Broadcast({"head.weight": torch.zeros(1), "control/head.weight": torch.zeros(1), "index": torch.tensor([0])})
    updates = [
        Update(k, {"head.weight": torch.tensor([v]), "control/head.weight": torch.tensor([c]), "index": torch.tensor([int(c)])}, 1.0)
        for k, (v, c) in enumerate([(0.0, 5.0), (1.0, 1e3), (2.0, 0.0), (4.0, 0.0), (100.0, 0.0)])
    ]
    assert clients(krum(1)(updates, lambda client: sent)) == [1]


def test_a_layer_that_a_client_was_not_sent_counts_as_unchanged():
    draw = drawn(5)
    deep = {f"{layer}.{part}": tensor for layer in ("low", "high") for part, tensor in zip("AB", draw.pair().values(), strict=True)}
    sent = [Broadcast(deep if k % 2 else {name: t for name, t in deep.items() if name.startswith("low")}) for k in range(6)]
    each = [draw.near(one.tensors) for one in sent]
    each[3] = draw.near(deep, 1.0)
    updates = [Update(k, tensors, 1.0) for k, tensors in enumerate(each)]
    assert clients(krum(1, None)(updates, sent.__getitem__)) == [0, 1, 2, 4, 5]


def test_clients_that_agree_are_kept_in_their_order():
    assert clients(krum(1, keep=2)(heads(3.0, 3.0, 3.0, 3.0), lambda client: start())) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_krum_takes_tensors_of_any_precision(dtype):
    draw = drawn(6)
    sent = draw.pair()
    each = [draw.near(sent, 0.1) for _ in range(5)]
    each[4] = {name: -tensor if name == "q.A" else tensor for name, tensor in sent.items()}
    updates = [Update(k, {name: tensor.to(dtype) for name, tensor in tensors.items()}, 1.0) for k, tensors in enumerate(each)]
    assert clients(krum(1, None)(updates, lambda client: Broadcast({n: t.to(dtype) for n, t in sent.items()}))) == [0, 1, 2, 3]


def test_a_large_tensor_is_compared_in_pieces(monkeypatch):
    monkeypatch.setattr("fedpeft.select.CHUNK", 3)
    updates = heads(*([v] * 7 for v in (0.0, 1.0, 2.0, 4.0, 100.0)))
    assert clients(krum(1)(updates, lambda client: start(7))) == [1]


# What is refused


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_cohort_too_small_for_krum_says_so(values):
    with pytest.raises(ValueError, match=r"krum needs cohort >= hostile \+ 3, got .*select\.hostile=1"):
        list(krum(1)(heads(*values), lambda client: start()))


@pytest.mark.parametrize("hostile", [-0.1, -1, 1.5, float("nan"), float("inf"), "some", True])
def test_hostile_clients_that_cannot_be_are_refused(hostile):
    with pytest.raises(ValueError, match=r"select\.hostile="):
        krum(hostile)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "all"])
def test_a_number_to_keep_that_cannot_be_is_refused(keep):
    with pytest.raises(ValueError, match=r"select\.keep="):
        krum(0.2, keep)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "far", True])
def test_bounds_and_factors_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match=r"select\.bound="):
        norm_bound(value)
    with pytest.raises(ValueError, match=r"select\.factor="):
        norm_bound(factor=value)


def test_without_updates_the_norm_bound_gives_none():
    assert list(norm_bound()([], lambda client: start())) == []
