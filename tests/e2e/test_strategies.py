"""One small run of every strategy, from the command line's words to an adapter that stock peft loads."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

import server.app
from experiments.simulate import simulate
from fedpeft.config import app_folder, presets_of
from server.export import export

pytestmark = [
    pytest.mark.slow,
    # stock peft loading an adapter: nothing that we call
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
RUN = [
    "rounds=4",
    "clients=6",
    "cohort=3",
    "train.steps=2",
    "evaluate.every=4",
    "evaluate.head_only=false",
    "model.epochs=1",
    "engine.lanes=1",
]
PRESETS = presets_of("strategy", app_folder() / "experiments" / "conf")
MORE = {"scaffold": ["train.optimizer=sgd", "train.lr=0.05"]}  # what a preset needs
RUNS = {name: [f"strategy={name}", *MORE.get(name, [])] for name in PRESETS} | {
    "fed_sb gradient": ["strategy=fed_sb", "strategy.start=gradient"],
    "fed_sb sign": ["strategy=fed_sb", "strategy.start=sign", "strategy.step=0.001"],
    "hetlora that prunes": ["strategy=hetlora", "strategy.penalty=1", "strategy.gamma=0.6"],
    "hetlora, ranks 2 4 8": ["strategy=hetlora", "devices=[2,4,8]", "strategy.rankwise=true"],
    "flora, ranks 2 4 8": ["strategy=flora", "devices=[2,4,8]"],
    "flexlora, phones": ["strategy=flexlora", "devices={phone: {rank: 2, alpha: 4, share: 0.5}, laptop: {rank: 8, share: 0.5}}"],
}
FOLDED = {"flora", "florist", "fedex", "flora, ranks 2 4 8"}  # part of whose model lies in the base


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_an_adapter_that_stock_peft_computes_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = []
    monkeypatch.setattr(server.app, "export", lambda *what: last.append(what) or export(*what))
    summary = simulate([*RUN, *RUNS[name], f"run.dir={tmp_path}"])
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["answers"], line["faults"]) for line in lines] == [(3, [])] * 4
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert math.isfinite(summary.outcome.loss)
    assert summary.outcome.bytes_up > 0

    ((setting, adapter, sent, folder),) = last
    assert bool(sent.base_delta) == (name in FOLDED)
    adapted = setting.on(adapter)
    adapted.fill(sent.tensors)
    inputs, labels = setting.test.batch(torch.arange(len(setting.test)))
    with torch.no_grad():
        alone = adapted.logits(inputs)
        with adapted.shifted(sent.base_delta):
            ours = adapted.logits(inputs)

    facts = json.loads((folder / "adapter_config.json").read_text())
    stock = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(facts["base_model_name_or_path"]), folder).eval()
    with torch.no_grad():
        theirs = stock(**inputs).logits
    assert float((theirs - ours).abs().max()) < 1e-4
    assert (float((theirs - alone).abs().max()) > 1e-3) == (name in FOLDED)
    if summary.outcome.measure == "global":
        assert float(torch.nn.functional.cross_entropy(theirs, labels)) == pytest.approx(summary.outcome.loss, abs=1e-4)
        assert float((theirs.argmax(-1) == labels).float().mean()) == pytest.approx(summary.outcome.final, abs=1 / len(labels))
