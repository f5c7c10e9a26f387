"""`fedpeft export`: what a run added to its base, as files that stock libraries load."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from experiments.export import export_run
from experiments.simulate import simulate
from fedpeft import checkpoint
from fedpeft.config import ConfigError
from fedpeft.setting import open_setting, strategy_of
from server.app import known_classes
from server.folder import reopen

pytestmark = pytest.mark.slow
TINY = ["clients=4", "cohort=3", "rounds=2", "train.steps=2", "model.epochs=1", "evaluate.head_only=false", "engine.lanes=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of FedEx, whose base has moved beside its LoRA."""
    place = tmp_path_factory.mktemp("export") / "run"
    simulate([*TINY, "strategy=fedex", f"run.dir={place}"])
    return place


@pytest.fixture(scope="module")
def logits(run: Path) -> tuple[torch.Tensor, torch.Tensor, Path]:
    """(pixels, the global model's logits, the folder of its stock base)."""
    folder, config = reopen(run)
    setting, strategy = open_setting(config), strategy_of(config)
    found = checkpoint.read(checkpoint.found(folder.checkpoints)[-1], known_classes(strategy.init(setting.starts())))
    sent = strategy.broadcast(found.state[0], found.round, None)
    assert sent.base_delta
    adapted = setting.on("main")
    adapted.fill(sent.tensors)
    inputs, _ = setting.test.batch(torch.arange(8))
    with adapted.shifted(sent.base_delta), torch.no_grad():
        return inputs["pixel_values"], adapted.logits(inputs), Path(setting.base.source)


def test_a_runs_adapter_is_the_exact_model_in_stock_peft(run, logits):
    pixels, want, base = logits
    model = peft.PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), run / "adapter").eval()
    with torch.no_grad():
        assert (model(pixel_values=pixels).logits - want).abs().max() <= 1e-4 * want.abs().max()
    assert "from_pretrained" in (run / "adapter" / "README.md").read_text()


def test_the_whole_and_the_merged_export_compute_the_same(run, logits, tmp_path):
    pixels, want, base = logits
    assert "a PEFT adapter after round 2 of 2" in export_run(run, tmp_path / "whole", rank=None, merge=False)
    assert "merged in" in export_run(run, tmp_path / "merged", rank=None, merge=True)
    models = (
        peft.PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), tmp_path / "whole"),
        ViTForImageClassification.from_pretrained(tmp_path / "merged"),
    )
    for model in models:
        with torch.no_grad():
            assert (model.eval()(pixel_values=pixels).logits - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_cut_says_its_error_which_is_that_of_the_products(run, tmp_path):
    said = export_run(run, tmp_path / "cut", rank=2, merge=False)
    export_run(run, tmp_path / "whole", rank=None, merge=False)
    cut, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    top = bottom = 0.0
    for name in cut:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            true = whole[other].double() @ whole[name].double()
            top += float((cut[other].double() @ cut[name].double() - true).square().sum())
            bottom += float(true.square().sum())
            assert len(cut[name]) == 2
    assert f"relative error {(top / bottom) ** 0.5:.3g}" in said
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 2


def test_what_cannot_be_exported_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match="--rank 0: needed is at least 1"):
        export_run(run, tmp_path / "x", rank=0, merge=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        export_run(run, tmp_path / "full", rank=None, merge=False)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        export_run(tmp_path, tmp_path / "x", rank=None, merge=False)


def test_an_adapter_without_products_says_so(tmp_path):
    simulate([*TINY, "adapter=bias", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="adds no low-rank products"):
        export_run(tmp_path / "run", tmp_path / "x", rank=None, merge=False)
