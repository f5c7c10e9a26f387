"""Any tuner of the installed peft, by its name and the fields of its config."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from torch import nn

from fedpeft import seeds
from fedpeft.adapters.base import Adapted
from fedpeft.adapters.injected import TASKS, attach, heads
from fedpeft.models.base import Base

CANNOT = {
    "LILY": "its router averages over a batch, so that an example's logits depend on the examples beside it",
    "MULTITASK_PROMPT_TUNING": "it asks for the task of each example (task_ids), which examples here do not have",
    "POLY": "it asks for the task of each example (task_ids), which examples here do not have",
    "XLORA": "it mixes LoRA adapters trained before, which every client would have to hold",
}

# Fields that act only through calls or losses which a training loop for all tuners does not have: AdaLoRA keeps its first rank.
IDLE = {
    "ADALORA": ("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern"),
    "ADAMSS": ("use_asa",),
    "CPT": ("opt_weighted_loss_type", "opt_loss_decay_factor"),
}

REWRITES = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")  # values of init_lora_weights that change frozen weights or read data
DRAWS = ("projection_prng_key", "random_loc_seed", "random_seed", "projection_seed", "proj_seed")  # fields that seed frozen random tensors


@dataclass(frozen=True)
class Tuner:
    """`type` is a name of peft's PeftType (IA3, OFT, VERA, ...), `options` the fields of its config.

    ADAMSS, FROD, OSF and PSOFT freeze factors of an SVD of the base: these agree between machines as far as their linear algebra does.
    """

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, base: Base, seed: int) -> Adapted:
        """Injects the tuner; what it draws, trained or frozen, depends on `seed` alone."""
        kind = self.type.upper()
        known = {tuner.name: cls for tuner, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if kind not in known or kind in CANNOT:
            fault = f"cannot be federated: {CANNOT[kind]}" if kind in CANNOT else f"is not a tuner of peft {peft.__version__}"
            raise ValueError(f"adapter.type={kind} {fault}; there are {', '.join(sorted(known.keys() - CANNOT))}")
        _check(kind, self.options, known[kind])
        if issubclass(known[kind], peft.PromptLearningConfig):
            _check_prompt(kind, self.options, base)
        try:
            config = known[kind](**_fields(known[kind], self.options, base, seed))
        except (ValueError, TypeError) as fault:
            raise ValueError(f"adapter.options: {fault}") from fault
        return attach(base, config, seed)


def _check(kind: str, options: Mapping[str, Any], config: type[peft.PeftConfig]) -> None:
    """Raises `ValueError` for an option that does not exist or would be passed over in silence."""
    fields = inspect.signature(config).parameters
    for name, value in options.items():
        if name not in fields:
            raise ValueError(f"adapter.options.{name} is not a field of {config.__name__}; there are {', '.join(sorted(fields))}")
        if name in IDLE.get(kind, ()):
            raise ValueError(f"adapter.options.{name} would do nothing: local training makes no calls of {kind}'s own; leave it out")
        if name == "init_lora_weights" and str(value).startswith(REWRITES):
            raise ValueError(
                f"adapter.options.{name}={value} changes the frozen weights, which all clients hold alike; choose gaussian or true"
            )
        if "dropout" in name and value:
            raise ValueError(f"adapter.options.{name}={value}: clients train without dropout, as their frozen base runs; leave it out")


def _check_prompt(kind: str, options: Mapping[str, Any], base: Base) -> None:
    if TASKS[base.task] is None:
        raise ValueError(f"adapter.type={kind} puts tokens before a text, the data's task is {base.task}; choose adapter=visual_prompt")
    if kind != "CPT" and not options.get("num_virtual_tokens"):
        raise ValueError("adapter.options.num_virtual_tokens is not set; for instance adapter.options.num_virtual_tokens=20")
    if kind in ("PROMPT_TUNING", "P_TUNING") and "score.weight" in base.head:  # transformers' name for the head of a decoder
        raise ValueError(
            f"adapter.type={kind}: a {type(base.module).__name__} given embeddings reads the class at the end of the padding, "
            "not of the text; choose adapter=prefix"
        )


def _fields(config: type[peft.PeftConfig], options: Mapping[str, Any], base: Base, seed: int) -> dict[str, Any]:
    """The options, the head left out of the targets, no dropout, frozen random tensors drawn from `seed`."""
    fields = inspect.signature(config).parameters
    draw = seeds.seed(seed, purpose="adapter") % 2**31
    facts: dict[str, Any] = {name: 0.0 for name in fields if "dropout" in name} | {name: draw for name in DRAWS if name in fields}
    facts |= {name: value for name, value in (("progressbar", False), ("total_step", 1)) if name in fields}  # AdaLoRA wants some step
    facts |= {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    if "exclude_modules" in fields:
        facts["exclude_modules"] = _with_head(facts.get("exclude_modules"), base)
    elif facts.get("target_modules") == "all-linear":
        facts["target_modules"] = _linear(base)
    if issubclass(config, peft.PromptLearningConfig):
        facts.setdefault("task_type", TASKS[base.task])
    return facts


def _with_head(excluded: str | list[str] | None, base: Base) -> str | list[str] | None:
    """`exclude_modules`, a list of names or a pattern, with the head added."""
    if isinstance(excluded, str):
        return "|".join([f"({excluded})", *map(re.escape, heads(base))])
    return [*(excluded or ()), *heads(base)] or None


def _linear(base: Base) -> list[str]:
    """The full names of all linear layers but the output's, for tuners that cannot exclude the head from "all-linear"."""
    output = getattr(base.module, "get_output_embeddings", lambda: None)()
    return [
        path
        for path, inner in base.module.named_modules()
        if (isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D") and inner is not output and path not in heads(base)
    ]
