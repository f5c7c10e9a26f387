"""Every random draw starts here, so that it depends on what it is for and on nothing else."""

import hashlib
from typing import Final

import numpy as np
from torch import Generator

SERVER: Final = -1  # the `client` of a draw that no client makes


def seed(run: int, *, round: int = -1, client: int = SERVER, purpose: str) -> int:
    """A 63-bit seed, the same on every machine and for every order of calls."""
    text = f"fedpeft/{run}/{round}/{client}/{purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(run: int, *, round: int = -1, client: int = SERVER, purpose: str) -> Generator:
    """A torch generator for one purpose of one client in one round of the run with seed `run`."""
    return Generator().manual_seed(seed(run, round=round, client=client, purpose=purpose))


def numpy_generator(run: int, *, round: int = -1, client: int = SERVER, purpose: str) -> np.random.Generator:
    """The same draw for numpy's distributions (Dirichlet and the like)."""
    return np.random.default_rng(seed(run, round=round, client=client, purpose=purpose))
