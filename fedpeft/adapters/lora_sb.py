"""LoRA-SB: a trained r x r core R between two factors, y = W x + B R A x (Ponkshe et al., https://arxiv.org/abs/2411.19557).

Fed-SB trains and exchanges R alone (Singhal et al., https://arxiv.org/abs/2502.15436): means of R are exact, since B and A are the same
everywhere. Here B and A are orthonormal, drawn from the run's seed, and R is zero, so the model starts unchanged; a strategy may send
others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.base import Adapted, head_parameters, is_transposed, precision, save_own, undoing
from fedpeft.models.base import Base
from fedpeft.tensors import targets


@dataclass(frozen=True)
class LoraSB:
    """`targets` is "all-linear" or the last parts of layers' names."""

    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"

    def attach(self, base: Base, seed: int) -> Adapted:
        """Wraps every target. Raises `ValueError` for a rank larger than its layer, and for a name that fits no layer."""
        chosen, undo = self._targets(base), undoing(base)
        rng = seeds.generator(seed, purpose="adapter")
        parameters: dict[str, nn.Parameter] = {}
        for path, inner in chosen.items():
            made = _Core(inner, self.rank, rng)
            base.module.set_submodule(path, made)
            parameters |= {f"{path}.{part}": getattr(made, part) for part in ("A", "R", "B")}
        parameters |= head_parameters(base)
        return Adapted(base, parameters, undo, save_own(parameters, "lora_sb"), products=frozenset(targets(parameters)))

    def _targets(self, base: Base) -> dict[str, nn.Module]:
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank}: needed is at least 1")
        last = base.module.get_output_embeddings()  # type: ignore[operator]  # every transformers model has it
        head = {name.rpartition(".")[0] for name in base.head}
        linear = {
            path: inner
            for path, inner in base.module.named_modules()
            if (isinstance(inner, nn.Linear) or is_transposed(inner)) and path not in head and inner is not last
        }
        found = dict(linear) if self.targets == "all-linear" else {}
        for target in () if self.targets == "all-linear" else (self.targets,) if isinstance(self.targets, str) else self.targets:
            fits = {path: inner for path, inner in linear.items() if f".{path}".endswith(f".{target}")}
            if not fits:
                raise ValueError(f"adapter.targets: no layer's name ends in {target}; there are {', '.join(linear)}")
            found |= fits
        for path, inner in found.items():
            assert isinstance(inner.weight, Tensor)
            if self.rank > min(inner.weight.shape):
                raise ValueError(
                    f"adapter.rank={self.rank} is larger than the layer {path} ({' x '.join(map(str, inner.weight.shape))}); "
                    f"needed is at most {min(inner.weight.shape)}"
                )
        return found


class _Core(nn.Module):
    def __init__(self, inner: nn.Module, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self.base_layer = inner
        weight = inner.weight
        assert isinstance(weight, Tensor)
        out, into = reversed(weight.shape) if is_transposed(inner) else weight.shape
        a, b = (torch.linalg.qr(torch.randn(size, rank, generator=rng, dtype=torch.float64))[0] for size in (into, out))
        self.A, self.R, self.B = (nn.Parameter(value.to(weight.device, precision(weight))) for value in (a.T, torch.zeros(rank, rank), b))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        inside = x.to(self.A.dtype) @ self.A.T @ self.R.T
        return y + (inside @ self.B.T).to(y.dtype)
