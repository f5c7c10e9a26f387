"""Adapters that train parameters the base already has: the head alone, every bias (BitFit), or everything.

BitFit: Ben Zaken et al., ACL 2022, https://arxiv.org/abs/2106.10199. FedPEFT calls the three `head`, `bias` and `full`
(Sun et al., https://arxiv.org/abs/2210.01708).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fedpeft.adapters.base import Adapted, head_parameters, restore, save_own, undoing
from fedpeft.models.base import Base


@dataclass(frozen=True)
class InPlace:
    """`trains` says which of the base's own parameters are trained beside the head."""

    trains: Literal["head", "bias", "full"] = "head"

    def attach(self, base: Base, seed: int) -> Adapted:
        """Starts from the base's own values; nothing is drawn."""
        undo = undoing(base)
        chosen = {
            name: parameter
            for name, parameter in base.module.named_parameters()
            if name not in base.head and self._takes(name) and parameter.is_floating_point()
        }
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in chosen.values()):
            raise ValueError(
                f"adapter={self.trains} trains the base's own tensors, half precision would lose its steps; set model.dtype=fp32"
            )
        start = {name: parameter.detach().clone() for name, parameter in chosen.items()}
        if not chosen and (self.trains != "head" or not base.head):
            raise ValueError(
                f"adapter.trains={self.trains}: this {type(base.module).__name__} has no {self.trains} to train; choose adapter=lora"
            )
        parameters = chosen | head_parameters(base)

        def off() -> None:
            undo()
            restore(base, start)

        return Adapted(base, parameters, off, save_own(parameters, self.trains))

    def _takes(self, name: str) -> bool:
        return self.trains == "full" or (self.trains == "bias" and name.rpartition(".")[2] == "bias")
