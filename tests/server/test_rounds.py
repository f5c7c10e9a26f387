import itertools
import random
import weakref

import pytest
import torch

from fedpeft.aggregate import median, weighted_mean
from fedpeft.codecs.raw import Raw
from fedpeft.cohort import Cohort, fixed
from fedpeft.privacy.spending import SPENT
from fedpeft.privacy.statement import Spent
from fedpeft.strategy import Phase, always
from server.rounds import ATTEMPTS, Exhausted, RoundFailed, run
from strategies.fedavg import FedAvg
from strategies.fedopt import FedOpt
from strategies.fedsa import fedsa_lora
from strategies.ffa import ffa_lora
from strategies.rolora import rolora

pytestmark = pytest.mark.fast


def everyone(count):
    return lambda round, attempt: Cohort(tuple(range(count)), 1.0)


def play(serve, joined, start, *, count=3, rounds=1, draw=None, mean=weighted_mean, first=0, **how):
    """All rounds of `serve`'s clients."""
    strategy = serve.strategy
    return list(
        run(
            strategy, strategy.init({"main": start}), joined(serve, count), draw or everyone(count), mean, first=first, rounds=rounds, **how
        )
    )


def test_a_round_is_the_weighted_mean_of_what_clients_sent(clients, joined, start):
    (done,) = play(clients(FedAvg()), joined, start)
    moved = (1 * 1 / 2 + 2 * 1 / 3 + 3 * 1 / 4) / 6  # client k has k + 1 examples and moves by 1 / (k + 2)
    assert torch.allclose(done.state.tensors["q.A"], start["q.A"] + moved, rtol=0, atol=1e-6)
    assert (done.round, done.answers, done.traffic.faults) == (0, 3, [])
    assert done.loss == pytest.approx((1 * 0 + 2 * 1 + 3 * 2) / 6)  # client k reports a loss of k
    assert done.seconds > 0


def test_rounds_come_one_at_a_time_and_only_when_asked_for(clients, joined, start):
    serve = clients(FedAvg())
    rounds = run(serve.strategy, serve.strategy.init({"main": start}), joined(serve, 2), everyone(2), weighted_mean, first=0, rounds=3)
    assert serve.down == []
    next(rounds)
    assert len(serve.down) == 2
    assert [done.round for done in rounds] == [1, 2]


def test_a_resumed_run_goes_on_with_the_rounds_that_are_left(clients, joined, start):
    assert [done.round for done in play(clients(FedAvg()), joined, start, first=3, rounds=5)] == [3, 4]
    assert play(clients(FedAvg()), joined, start, first=5, rounds=5) == []


@pytest.mark.parametrize("build", [FedAvg, ffa_lora, rolora, fedsa_lora, FedOpt])
@pytest.mark.parametrize("mean", [weighted_mean, median()], ids=["weighted", "median"])
def test_the_order_in_which_replies_arrive_changes_no_bit(clients, joined, start, build, mean):
    def shuffled(seed):
        rng = random.Random(seed)
        return lambda messages: rng.sample(list(messages), len(messages))

    ends = []
    for order in (list, lambda messages: list(reversed(messages)), shuffled(1), shuffled(2)):
        strategy = build()
        last = play(clients(strategy, order=order), joined, start, count=5, rounds=3, mean=mean)[-1]
        ends.append((strategy.broadcast(last.state, 3, None).tensors, last.loss, last.traffic.up, last.traffic.down))
    for tensors, *rest in ends[1:]:
        assert tuple(rest) == ends[0][1:]
        assert all(torch.equal(tensor, ends[0][0][name]) for name, tensor in tensors.items())


def test_the_phase_follows_the_round(clients, joined, start):
    serve = clients(rolora())
    play(serve, joined, start, count=1, rounds=4)
    assert ["q.A" in payload.header for _, payload in serve.up] == [False, True, False, True]


def test_a_client_that_misbehaves_is_a_named_fault_and_the_round_goes_on_without_it(clients, joined, start, odd):
    answer, words = odd
    (done,) = play(clients(FedAvg(), odd={1: answer}), joined, start)
    (alone,) = play(clients(FedAvg()), joined, start, draw=lambda round, attempt: Cohort((0, 2), 1.0))
    assert done.answers == 2
    (fault,) = done.traffic.faults
    assert fault.client == 1
    assert words in fault.reason
    assert all(torch.equal(tensor, alone.state.tensors[name]) for name, tensor in done.state.tensors.items())
    assert done.loss == alone.loss


def test_every_client_misbehaving_ends_the_run_after_three_draws_with_the_first_reason(clients, joined, start, odd):
    answer, words = odd
    draws = []

    def draw(round, attempt):
        draws.append((round, attempt))
        return Cohort((0, 1), 1.0)

    with pytest.raises(RoundFailed) as fault:
        play(clients(FedAvg(), odd={0: answer, 1: answer}), joined, start, count=2, draw=draw)
    assert draws == [(0, 0), (0, 1), (0, 2)]
    assert ATTEMPTS == 3
    said = str(fault.value)
    assert "round 0: 0 clients answered, min_clients=1 are needed" in said
    assert "client 0: " in said
    assert words in said
    assert "--resume" in said


def test_a_cohort_nobody_answers_is_drawn_anew_under_the_same_round(clients, joined, start, failing_client):
    asked = []

    def draw(round, attempt):
        asked.append((round, attempt))
        return Cohort((attempt,), 0.5)

    serve = clients(rolora(), odd={0: failing_client})
    done = play(serve, joined, start, count=2, rounds=2, draw=draw)
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [one.cohort.clients for one in done] == [(1,), (1,)]
    assert ["q.A" in payload.header for _, payload in serve.up] == [False, True]  # phases stayed in step
    assert [fault.client for one in done for fault in one.traffic.faults] == [0, 0]


def test_too_few_answers_leave_no_trace(clients, joined, start, failing_client):
    """A client that answers a round which fails must not count twice in the draw that succeeds."""
    down = []

    def fails_once(clients, message, client):
        down.append(client)
        return failing_client(clients, message, client) if len(down) == 1 else clients.answer(message, client)

    def draw(round, attempt):
        return Cohort((0, 1), 1.0)

    (done,) = play(clients(FedAvg(), odd={1: fails_once}), joined, start, count=2, draw=draw, min_clients=2)
    (plain,) = play(clients(FedAvg()), joined, start, count=2, draw=draw)
    assert done.answers == 2
    assert len(done.traffic.faults) == 1
    assert all(torch.equal(tensor, plain.state.tensors[name]) for name, tensor in done.state.tensors.items())
    assert done.loss == plain.loss


def test_min_clients_that_are_never_reached_end_the_run_and_keep_the_rounds_before(clients, joined, start, failing_client):
    def fails_later(clients, message, client):
        return (
            failing_client(clients, message, client)
            if message.content.config_records["facts"]["round"] == 2
            else clients.answer(message, client)
        )

    serve = clients(FedAvg(), odd={1: fails_later, 2: fails_later})
    rounds = run(
        serve.strategy, serve.strategy.init({"main": start}), joined(serve, 3), everyone(3), weighted_mean, first=0, rounds=5, min_clients=2
    )
    assert [done.round for done in itertools.islice(rounds, 2)] == [0, 1]
    with pytest.raises(RoundFailed, match=r"round 2: 1 clients answered, min_clients=2 are needed.*client 1: client 1 ran out of memory"):
        next(rounds)


def test_bytes_of_all_draws_of_a_round_are_counted(clients, joined, start, failing_client):
    serve = clients(FedAvg(), odd={0: failing_client})
    (done,) = play(serve, joined, start, count=2, draw=lambda round, attempt: Cohort((attempt,), 0.5))
    assert len(serve.down) == 2
    assert done.traffic.down == sum(len(payload) for _, payload in serve.down)
    assert done.traffic.up == sum(len(payload) for _, payload in serve.up)


def test_a_strategy_whose_clients_prune_is_given_any_rank(clients, joined, start):
    class AnyRank(FedAvg):
        mean_only = False

    prunes = AnyRank(always(Phase(finish=lambda now, start, steps: now)))

    def pruned(clients, message, client):
        return clients.answer(message, client, lambda t: t | {"q.A": t["q.A"][:1], "q.B": t["q.B"][:, :1]})

    (done,) = play(clients(prunes, odd={0: pruned}), joined, start, count=1)
    assert done.state.tensors["q.A"].shape == (1, 5)
    for strategy in (FedAvg(), AnyRank()):  # a mean takes one shape, and who does not prune ends with the rank it was sent
        with pytest.raises(RoundFailed, match=r"q\.A is \(1, 5\)"):
            play(clients(strategy, odd={0: pruned}), joined, start, count=1)


def test_a_loss_that_nobody_reports_is_not_a_number_and_no_crash(clients, joined, start):
    (done,) = play(clients(FedAvg(), odd={0: lambda c, m, k: c.answer(m, k, loss=float("nan"))}), joined, start, count=1)
    assert done.loss != done.loss


def test_a_real_cohort_and_a_seed_give_the_same_run_twice(clients, joined, start):
    ends = [play(clients(FedAvg()), joined, start, count=8, rounds=4, draw=fixed(8, 3, 5)) for _ in range(2)]
    for one, other in zip(*ends, strict=True):
        assert one.cohort == other.cohort
        assert all(torch.equal(tensor, other.state.tensors[name]) for name, tensor in one.state.tensors.items())


def test_a_round_holds_at_most_two_updates_at_a_time(clients, joined, start):
    """The one that is folded, and the one that is decoded next, however many clients there are."""
    alive: list[weakref.ref] = []

    class Watched(Raw):
        def decode(self, data, layout, *, seed=0):
            tensors = super().decode(data, layout, seed=seed)
            alive.append(weakref.ref(tensors["q.A"]))
            most.append(sum(one() is not None for one in alive))
            return tensors

    most: list[int] = []
    play(clients(FedAvg(), codec=Watched()), joined, start, count=8)
    assert len(most) == 8
    assert max(most) <= 2


def test_what_is_spent_is_the_most_that_clients_say_and_nothing_that_cannot_be(clients, joined, start):
    says = {0: (1.5, 1e-6), 1: (2.5, 1e-7), 2: (float("nan"), 1e-5), 3: (9.0, 2.0), 4: (-1.0, 0.5), 5: (2.0, 1e-5)}
    odd = {k: lambda c, m, k: c.answer(m, k, epsilon=says[k][0], delta=says[k][1]) for k in says}
    (done,) = play(clients(FedAvg(), odd=odd), joined, start, count=6)
    assert done.spent == Spent(2.5, 1e-5, heard=True)
    assert play(clients(FedAvg()), joined, start)[0].spent is None


def test_clients_that_have_spent_their_budgets_end_the_run_also_in_flowers_words(clients, joined, start):
    def spent(*_):
        raise ArithmeticError(f"<class 'clients.faults.Told'>:<'{SPENT}: epsilon 3.9 of 4 at delta 1e-05'>")

    with pytest.raises(Exhausted, match="the privacy budget is spent"):
        play(clients(FedAvg(), odd=dict.fromkeys(range(3), spent)), joined, start)
