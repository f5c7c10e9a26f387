"""What all tests share: one cache of tiny models, so that each is pre-trained once."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real data sets; tests that need them are skipped where they are not


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_an_own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    base = tmp_path_factory.getbasetemp()
    os.environ["FEDPEFT_CACHE"] = str((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "fedpeft-cache")
