"""What an epsilon means: nobody is shown the number without its unit, relation, delta, sampling, adversary, and what it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.privacy.unit import Client, Example, Unit

INSECURE = "NOT PRIVATE: privacy.noise=seeded-insecure, whoever knows the run's seed can subtract the noise. For simulations alone."
PUBLISHED = (
    "NOT A VALID CLAIM: counted as Fed-SB's published code does, with delta = 1 / batches (far above 1 / examples) and "
    "gradients of the start neither noised nor counted. To compare with its tables alone; privacy=honest is the same with a valid count."
)


@dataclass(frozen=True)
class Spent:
    """What was spent: the largest epsilon and the largest delta of all clients."""

    epsilon: float
    delta: float
    heard: bool = False  # clients said so with the replies that came: their own ledgers, which have all, lie with them

    def most(self, other: "Spent | None") -> "Spent":
        """What covers both."""
        if other is None:
            return self
        return Spent(max(self.epsilon, other.epsilon), max(self.delta, other.delta), self.heard)


def statement(unit: Unit, *, spent: Spent, sizes: Sequence[int], cohort: int, batch: int) -> list[str]:
    """Lines for a report. `sizes` are the clients' examples, of which nothing is said where only replies tell what was spent."""
    many, epsilon, delta = len(sizes), spent.epsilon, spent.delta
    first = [INSECURE] if unit.noise == "seeded-insecure" else []
    if isinstance(unit, Example) and unit.published:
        first.append(PUBLISHED)
    whole = (
        f"epsilon {epsilon:.3f} at delta {delta:.2g}, by the privacy loss distributions of all releases (dp-accounting), add or remove one"
    )
    if isinstance(unit, Client):
        return [
            *first,
            f"{whole} client: all that one of {many} clients sent in all rounds.",
            f"Mechanism: Gaussian noise on the sum of changes clipped to {unit.clip:g}"
            + (" (the clip then follows a noised quantile)" if unit.quantile else "")
            + f", divided by {cohort}, the expected number of clients of a round.",
            "Hidden from: whoever sees the released models"
            + (
                " and does not know who took part; each round drew each client by a secret coin, and epsilon takes credit for that."
                if unit.adversary == "outsider"
                else " and knows who took part in which round; no credit is taken for rounds that a client sat out."
            ),
            "Trusted: the server, which sees each client's update before it is noised. Only the adapter and its card are released: all "
            "else in the run's folder (ledger, report, result, log, checkpoints) holds faults, answers, times and sizes of payloads "
            "of clients, without noise, and is the server's own.",
            "Not covered: hyperparameters chosen by looking at other runs on the same clients; accuracy measured on data of the clients; "
            "one person's data at several clients; what clients keep for themselves.",
        ]
    if spent.heard:
        rates = f"rate: batch {batch} over each client's own number of examples"
        known = ["Known: as far as the server heard. What a client spent on a reply that was lost or refused, its own ledger alone has."]
        who = f"the largest that one of {many} clients said of itself, counted by its own ledger"
    else:
        low, high = min(1.0, batch / max(sizes)), min(1.0, batch / min(sizes))
        rates = f"rate {low:.3g} to {high:.3g}: batch {batch} of {min(sizes)} to {max(sizes)} examples"
        known, who = [], f"the largest of {many} clients"
    return [
        *first,
        f"{whole} example of one client; {who}. Clients' data are disjoint: a person at two of them adds both up.",
        *known,
        f"Mechanism: at each client, gradients of single examples clipped to {unit.clip:g} over all trained tensors together, summed over "
        f"Poisson batches ({rates}), noise, divided by the expected size of a batch.",
        "Hidden from: whoever sees what a client sends in all rounds, the server too. No credit for rounds that a client sits out.",
        "Public: how many examples each client has (one that is added or removed leaves its place empty), and how many steps it takes.",
        "Not covered: hyperparameters chosen by looking at other runs on the same data; the test set and what is measured on it; the data "
        "that the base model was trained on; an example that occurs more than once.",
    ]
