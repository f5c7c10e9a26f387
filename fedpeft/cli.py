"""The `fedpeft` command: puts the app folder on the path and hands over to `experiments/cli.py` by name, as Flower does with a bundle."""

import importlib
import os
import sys

from fedpeft.config import app_folder


def main() -> None:
    """Entry point of the console script."""
    # Before torch loads: spinning threads on a busy machine are ten times slower, and tokenizers must not fork theirs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms on a GPU need
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    if str(app_folder()) not in sys.path:
        sys.path.insert(0, str(app_folder()))
    importlib.import_module("experiments.cli").main()
