"""Tensors: a flat dict of named tensors, and predicates on its names.

A name is `<layer>.<part>` for an adapter's tensor (`encoder.layer.0.attention.self.query.A`), `head.<parameter>` for the task head, and
`<owner>/<name>` for a tensor that belongs to a strategy: adapters skip every name with a slash.
"""

import math
from collections.abc import Callable, Iterable

from torch import Tensor

Tensors = dict[str, Tensor]
Names = Callable[[str], bool]


def everything(name: str) -> bool:
    """True for every name."""
    return True


def nothing(name: str) -> bool:
    """False for every name."""
    return False


def is_a(name: str) -> bool:
    """True for the A factor (rank x in) of a low-rank pair."""
    return name.endswith(".A")


def is_b(name: str) -> bool:
    """True for the B factor (out x rank) of a low-rank pair."""
    return name.endswith(".B")


def not_a(name: str) -> bool:
    """True for everything but A factors: B, the head, and whatever else is trained."""
    return not is_a(name)


def not_b(name: str) -> bool:
    """True for everything but B factors."""
    return not is_b(name)


def is_factor(name: str) -> bool:
    """True for the A or B factor of a low-rank pair."""
    return is_a(name) or is_b(name)


def not_factor(name: str) -> bool:
    """True for everything but A and B factors."""
    return not is_factor(name)


def rank_axes(name: str) -> tuple[int, ...]:
    """The axes of a factor or core that are its rank: the ones that may differ between clients."""
    return {".A": (0,), ".B": (1,), ".R": (0, 1)}.get(name[-2:], ())


def is_head(name: str) -> bool:
    """True for the task head (a classifier's weight and bias)."""
    return name.startswith("head.")


def is_own(name: str) -> bool:
    """True for a tensor that only the strategy reads (a control variate, say)."""
    return "/" in name


def only(tensors: Tensors, names: Names) -> Tensors:
    """The tensors whose name satisfies `names`."""
    return {name: tensor for name, tensor in tensors.items() if names(name)}


def targets(names: Iterable[str]) -> list[str]:
    """The layers that have a low-rank pair, sorted."""
    return sorted(name[:-2] for name in names if is_b(name))


def nbytes(tensors: Tensors) -> int:
    """Bytes in memory."""
    return sum(tensor.nbytes for tensor in tensors.values())


def norm(tensors: Tensors) -> float:
    """Euclidean norm over all entries of all tensors, summed in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
