"""Adapters that train parameters the base already has: the head alone, every bias (BitFit), or everything.

BitFit: Ben Zaken et al., ACL 2022, https://arxiv.org/abs/2106.10199. FedPEFT calls the three `head`, `bias` and `full`
(Sun et al., https://arxiv.org/abs/2210.01708).
"""

from dataclasses import dataclass
from typing import Literal

from fedpeft.adapters.base import Adapted, head_parameters, restore, save_own
from fedpeft.models.base import Base


@dataclass(frozen=True)
class InPlace:
    """`trains` says which of the base's own parameters are trained beside the head."""

    trains: Literal["head", "bias", "full"] = "head"

    def attach(self, base: Base, seed: int) -> Adapted:
        """Starts from the base's own values; nothing is drawn."""
        chosen = {name: p for name, p in base.module.named_parameters() if name not in base.head and self._takes(name)}
        start = {name: parameter.detach().clone() for name, parameter in chosen.items()}
        parameters = chosen | head_parameters(base)
        if not parameters:
            raise ValueError(f"adapter.trains={self.trains}: this model has nothing of that kind to train; choose adapter=lora")

        def undo() -> None:
            restore(base, start | base.start)
            base.module.requires_grad_(False)

        return Adapted(base, parameters, undo, save_own(parameters, self.trains))

    def _takes(self, name: str) -> bool:
        return self.trains == "full" or (self.trains == "bias" and name.rpartition(".")[2] == "bias")
