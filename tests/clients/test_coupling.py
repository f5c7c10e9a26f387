"""A model that mixes the examples of a batch is found out, and each example runs alone then."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from clients.engine import Engine
from clients.private import choose
from clients.train import Private
from fedpeft.adapters.inplace import InPlace
from fedpeft.adapters.lora import Lora
from fedpeft.config import Options, Training
from fedpeft.models.base import Base
from fedpeft.privacy.noise import Secret
from fedpeft.strategy import Phase

PLAIN, SGD = Phase(), Training(steps=1, batch=4, optimizer="sgd", lr=1.0, head_lr=1.0)


def test_a_model_that_couples_its_examples_is_found_out(tiny, examples, caplog) -> None:
    base: Base = tiny("vit")
    adapted, data = InPlace("head").attach(base, seed=0), examples(base)
    base.module.vit.layernorm.register_forward_hook(lambda module, inputs, out: out + out.mean(0, keepdim=True))
    with pytest.raises(ValueError, match=r"privacy\.backend=hooks .* its gradient of head\.\S+ is not the loop's; set privacy"):
        choose(adapted, data, torch.arange(12), PLAIN, "hooks")
    with caplog.at_level(logging.INFO, "fedpeft"):
        assert choose(adapted, data, torch.arange(12), PLAIN, "auto") == "vmap"  # which runs the model on one example, too
    assert "by vmap (hooks: its gradient of head" in caplog.text


def crowd(module: nn.Module, inputs: object, out: torch.Tensor) -> torch.Tensor:
    """What a model does that couples its examples only where there are more than two, as experts with room for so many tokens do."""
    return out + out.mean(0, keepdim=True) if len(out) > 2 else out


def test_a_model_that_couples_more_than_two_examples_is_found_out(tiny, examples, jobs, caplog) -> None:
    base: Base = tiny("vit")
    adapted, data = Lora(rank=3).attach(base, seed=0), examples(base)
    base.module.vit.layernorm.register_forward_hook(crowd)
    with pytest.raises(ValueError, match="hooks: the gradient of an example changes with the others of its batch"):
        choose(adapted, data, torch.arange(12), PLAIN, "hooks")
    assert choose(adapted, data, torch.arange(12), PLAIN, "auto") == "vmap"
    (job, *_) = jobs(adapted.read(), SGD)
    caplog.set_level(logging.INFO, "fedpeft")
    engine = Engine(adapted, data, Options())
    (done,) = engine.train(PLAIN, [replace(job, private=Private(0.5, 4.0, 0.0, Secret(), lambda rows: [rows]))], round=0)
    assert not isinstance(done, ValueError)
    assert "what ViTForImageClassification makes of an example changes with the others of its batch" in caplog.text
    assert "by vmap" in caplog.text
