"""What all tests share: one cache of tiny models, so that each is pre-trained once, and examples that repeat."""

import os

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a test that fails, fails again. HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_an_own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    base = tmp_path_factory.getbasetemp()
    os.environ["FEDPEFT_CACHE"] = str((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "fedpeft-cache")
