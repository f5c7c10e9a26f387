"""The model card beside an exported adapter: what it is, how it was made, how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.config import Config
from fedpeft.privacy.statement import Spent, statement
from fedpeft.setting import Setting, privacy_of

PEFT = """```python
from peft import PeftModel
from transformers import {cls}

model = PeftModel.from_pretrained({cls}.from_pretrained({base!r}{labels}), "path/of/this/folder")
```"""
OWN = """This adapter is not one of peft's: `adapter.safetensors` holds its tensors under fedpeft's names. Load it with the run's config:

```python
from pathlib import Path

from fedpeft import load, load_adapter, open_setting

adapted = open_setting(load({overrides!r})).adapted
load_adapter(Path("path/of/this/folder"), adapted)
```"""
CLASSES = {"text": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification", "language": "AutoModelForCausalLM"}


def card(config: Config, setting: Setting, folder: Path, *, zero_shot: float, final: float, measure: str, spent: Spent | None) -> str:
    """The README.md of the adapter in `folder`."""
    base, task, classes = setting.base.source, setting.base.task, len(setting.dataset.classes)
    stock = (folder / "adapter_config.json").exists()
    shown = Path(base).name if Path(base).exists() else base
    labels = f", num_labels={classes}, ignore_mismatched_sizes=True" if classes else ""
    how = (
        PEFT.format(cls=CLASSES[task], base=base, labels=labels)
        if stock
        else OWN.format(overrides=[f"adapter={config.choices['adapter']}", "..."])
    )
    personal = (
        "\nClients keep tensors of their own in this strategy: the adapter alone is not the model that was measured.\n"
        if measure == "personal"
        else ""
    )
    privacy = "" if spent is None else "\n" + "\n".join(f"- {line}" for line in stated(config, setting, spent)) + "\n"
    applied = "no differential privacy was applied" if spent is None else "with differential privacy, as stated below"
    choices = ", ".join(f"{family} {name}" for family, name in config.choices.items())
    return f"""---
library_name: {"peft" if stock else "fedpeft"}
base_model: {shown}
tags: [federated-learning, fedpeft, {config.choices["adapter"]}]
---

# {config.choices["adapter"]} adapter, federated with {config.choices["strategy"]}

Trained by {config.clients} clients, {config.cohort} a round, in {config.rounds} rounds, with seed {config.seed}; no client's data left it,
and {applied}. Accuracy on the test set: {zero_shot:.3f} before training, {final:.3f} after ({measure} model).
{personal}{privacy}
{how}

Made by fedpeft with: {choices}.
"""


def stated(config: Config, setting: Setting, spent: Spent) -> list[str]:
    """What the run's epsilon means."""
    unit, sizes = privacy_of(config), [len(rows) for rows in setting.split.clients]
    assert unit is not None, "an epsilon without a unit"
    return statement(unit, spent=spent, sizes=sizes, cohort=config.cohort, batch=config.train.batch)


def spent_of(totals: Mapping[str, Any]) -> Spent | None:
    """What a run's totals say of its budget; None: no differential privacy."""
    return None if totals["epsilon"] is None else Spent(totals["epsilon"], totals["delta"], totals["heard"])
