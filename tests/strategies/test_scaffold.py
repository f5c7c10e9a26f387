from collections.abc import Sequence

import pytest
import torch

from fedpeft.aggregate import weighted_mean
from fedpeft.messages import Update
from fedpeft.strategy import Federation
from fedpeft.tensors import Tensors, is_own, only
from strategies.fedavg import FedAvg
from strategies.scaffold import correct, renew, scaffold

pytestmark = pytest.mark.fast
CLIENTS = 4


def run_of(cohort: int = CLIENTS) -> Federation:
    return Federation(clients=CLIENTS, cohort=cohort, optimizer="sgd")


RATES = {"q.A": 0.05, "head.bias": 0.02}  # of a step of SGD


class Quadratics:
    """Clients with losses (x - a)^T H (x - a) / 2 of their own curvature, in two tensors that move at different rates, played by hand."""

    def __init__(self, strategy: FedAvg, weights: Sequence[float] = (1.0,) * CLIENTS) -> None:
        rng = torch.Generator().manual_seed(0)
        shapes = {"q.A": 3, "head.bias": 2}
        roots = [{n: torch.randn(d, d, generator=rng, dtype=torch.float64) for n, d in shapes.items()} for _ in weights]
        self.H = [{n: r @ r.T + torch.eye(len(r), dtype=r.dtype) for n, r in each.items()} for each in roots]
        self.a = [{n: torch.randn(d, generator=rng, dtype=torch.float64) for n, d in shapes.items()} for _ in weights]
        self.strategy, self.weights, self.round = strategy, weights, 0
        self.memory: list[Tensors] = [{} for _ in weights]
        self.state = strategy.init({"main": {n: torch.zeros(d, dtype=torch.float64) for n, d in shapes.items()}})

    def gradient(self, k: int, x: Tensors) -> Tensors:
        return {n: self.H[k][n] @ (x[n] - self.a[k][n]) for n in RATES}

    def train(self, k: int, steps: int) -> Update:
        phase = self.strategy.phase(self.round)
        rates = {f"rate/{n}": torch.tensor(rate, dtype=torch.float64) for n, rate in RATES.items()} if phase.rates else {}
        start = self.strategy.broadcast(self.state, self.round, k).tensors | self.memory[k] | rates
        now = {n: start[n] for n in RATES}
        more = torch.func.grad(lambda x: phase.loss(x, start))(now) if phase.loss else dict.fromkeys(now, 0.0)  # it is linear
        for _ in range(steps):
            slope = self.gradient(k, now)
            now = {n: now[n] - RATES[n] * (slope[n] + more[n]) for n in now}
        end = phase.finish(now, start, steps) if phase.finish else now
        self.memory[k] = only(end, phase.keeps)
        return Update(k, only(end, phase.shares), self.weights[k])

    def advance(self, rounds: int, steps: int, cohort: int = CLIENTS) -> "Quadratics":
        for _ in range(rounds):
            who = [(self.round * cohort + i) % CLIENTS for i in range(cohort)]
            self.state = self.strategy.aggregate(self.state, self.round, [self.train(k, steps) for k in who], weighted_mean)
            self.round += 1
        return self

    def share(self, k: int) -> float:
        return self.weights[k] / sum(self.weights)

    def optimum(self) -> Tensors:
        """Of the weighted mean of all clients' losses."""
        best = {}
        for n in RATES:
            whole = sum(self.share(k) * self.H[k][n] for k in range(CLIENTS))
            best[n] = torch.linalg.solve(whole, sum(self.share(k) * self.H[k][n] @ self.a[k][n] for k in range(CLIENTS)))
        return best

    def off(self) -> float:
        return max(float((self.state.tensors[n] - x).norm() / x.norm()) for n, x in self.optimum().items())


UNEQUAL = (1.0, 5.0, 2.0, 0.5)


@pytest.mark.parametrize("weights", [(1.0,) * CLIENTS, UNEQUAL], ids=["equal", "unequal"])
def test_it_reaches_the_common_optimum_that_fedavg_of_many_steps_misses(weights):
    """Clients of different curvature: where local steps end on average is not where the mean loss is least."""
    ours, theirs = Quadratics(scaffold(run_of()), weights), Quadratics(FedAvg(), weights)
    assert ours.advance(200, steps=8).off() <= 1e-9
    assert theirs.advance(200, steps=8).off() > 0.02


def test_it_reaches_the_optimum_with_half_of_the_clients_in_a_round():
    assert Quadratics(scaffold(run_of(2))).advance(400, steps=5, cohort=2).off() <= 1e-9


def test_fedavg_of_single_steps_has_no_drift_and_scaffold_takes_the_same_steps():
    ours, theirs = Quadratics(scaffold(run_of()), UNEQUAL).advance(30, steps=1), Quadratics(FedAvg(), UNEQUAL).advance(30, steps=1)
    assert all(torch.allclose(ours.state.tensors[n], theirs.state.tensors[n], rtol=0, atol=1e-13) for n in RATES)


@pytest.mark.parametrize("weights", [(1.0,) * CLIENTS, UNEQUAL], ids=["equal", "unequal"])
def test_after_one_step_a_clients_variate_is_its_gradient_and_the_servers_their_mean(weights):
    game = Quadratics(scaffold(run_of()), weights).advance(3, steps=4)
    before = dict(game.state.tensors)
    game.advance(1, steps=1)
    for n in RATES:
        own = [game.gradient(k, before)[n] for k in range(CLIENTS)]
        for k in range(CLIENTS):
            assert torch.allclose(game.memory[k][f"mine/{n}"], own[k], rtol=0, atol=1e-12)
        mean = sum(game.share(k) * own[k] for k in range(CLIENTS))
        assert torch.allclose(game.state.tensors[f"control/{n}"], mean, rtol=0, atol=1e-12)


def test_after_more_steps_a_variate_is_the_mean_gradient_on_the_clients_way():
    """(start - now) / (steps rate) is the mean of g + c - c_i: option II."""
    game = Quadratics(scaffold(run_of())).advance(2, steps=3)
    start, memory = game.state.tensors, game.memory[1]
    seen, now = [], {n: start[n] for n in RATES}
    for _ in range(3):
        seen.append(game.gradient(1, now))
        corrected = {n: seen[-1][n] + start[f"control/{n}"] - memory[f"mine/{n}"] for n in now}
        now = {n: now[n] - RATES[n] * corrected[n] for n in now}
    update = game.train(1, 3)
    for n in RATES:
        assert torch.allclose(update.tensors[n], now[n], rtol=0, atol=1e-14)
        assert torch.allclose(game.memory[1][f"mine/{n}"], sum(g[n] for g in seen) / 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [None, 1.0])
def test_the_servers_variate_is_the_mean_of_the_clients_while_all_take_part(weights, federation):
    run = federation(scaffold(run_of()))
    shares = [(k + 1) / 10 if weights is None else 1 / 4 for k in range(CLIENTS)]
    for _ in range(5):
        run.take(run.play(range(CLIENTS), weight=weights)[0])
        control = {n: t for n, t in run.state.tensors.items() if n.startswith("control/")}
        for name, c in control.items():
            kept = [run.memory[k, "main"][name.replace("control/", "mine/")] for k in range(CLIENTS)]
            assert torch.allclose(c, sum(p * own for p, own in zip(shares, kept, strict=True)), rtol=0, atol=1e-11)


def test_with_equal_weights_the_servers_variate_is_the_mean_over_all_clients_also_when_some_are_away(federation):
    """Algorithm 1, line 17: c moves by |S| / N of the mean change; who was never drawn has zero."""
    run = federation(scaffold(run_of(2)))
    for who in ((0, 1), (1, 2), (0, 2), (2, 1)):
        run.take(run.play(who, weight=1.0)[0])
        for name, c in run.state.tensors.items():
            if name.startswith("control/"):
                mine = name.replace("control/", "mine/")
                kept = [run.memory.get((k, "main"), {}).get(mine, torch.zeros_like(c)) for k in range(CLIENTS)]
                assert torch.allclose(c, sum(kept) / CLIENTS, rtol=0, atol=1e-11)


def test_the_correction_is_c_minus_the_clients_own(federation):
    start = {"q.A": torch.ones(2), "control/q.A": torch.tensor([3.0, 1.0]), "mine/q.A": torch.tensor([1.0, 5.0])}
    now = {"q.A": torch.tensor([7.0, -2.0])}
    assert torch.func.grad(lambda x: correct(x, start))(now)["q.A"].tolist() == [2.0, -4.0]
    del start["mine/q.A"]
    assert torch.func.grad(lambda x: correct(x, start))(now)["q.A"].tolist() == [3.0, 1.0]


def test_a_client_that_was_never_there_starts_from_a_variate_of_zero():
    """By hand: it moved by -0.6 in 3 steps of rate 0.1, so c_i' = 0 - c + 2 = 1, and c + c_i' - 0 goes up."""
    start = {"q.A": torch.tensor([4.0]), "control/q.A": torch.tensor([1.0]), "rate/q.A": torch.tensor(0.1)}
    end = renew({"q.A": torch.tensor([3.4])}, start, 3)
    assert end["mine/q.A"].item() == pytest.approx(1.0, abs=1e-6)
    assert end["control/q.A"].item() == pytest.approx(2.0, abs=1e-6)


def test_only_the_model_and_what_moves_c_go_up_and_variates_stay(federation):
    run = federation(scaffold(run_of())).advance(1)
    updates, _ = run.play((0,))
    names = {n for n in run.state.tensors if not is_own(n)}
    assert set(updates[0].tensors) == names | {f"control/{n}" for n in names}
    assert set(run.memory[0, "main"]) == {f"mine/{n}" for n in names}
    assert run.phase.rates


def test_variates_start_at_zero_and_the_first_round_is_fedavgs(federation, distance):
    one, other = federation(scaffold(run_of())), federation(FedAvg())
    assert all(not bool(t.any()) for n, t in one.state.tensors.items() if is_own(n))
    for run in (one, other):
        run.take(run.play((0, 1, 2))[0])
    assert distance(one.model(), other.model()) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [({"optimizer": "adamw"}, "take adamw"), ({"momentum": 0.9}, "momentum 0.9"), ({"clip": 1.0}, "clip 1.0")],
)
def test_anything_but_plain_sgd_is_refused(more, said):
    with pytest.raises(ValueError, match=rf"{said}.*train\.optimizer=sgd train\.momentum=0 train\.clip=null"):
        scaffold(Federation(**({"optimizer": "sgd"} | more)))
