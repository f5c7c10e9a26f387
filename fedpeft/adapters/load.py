"""Reads an adapter that peft does not know (in place, bottleneck, visual prompt) back from its folder; see `base.save_own`."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedpeft.adapters.base import OWN, Adapted


def load_adapter(folder: Path, adapted: Adapted) -> None:
    """Writes the tensors of an exported `folder` into the same adapter on the same base model."""
    file = folder / OWN
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is in peft's format: load it by peft.PeftModel.from_pretrained(model, '{folder}')")
    if not file.exists():
        raise ValueError(f"{folder} has no {OWN}; give the adapter/ folder of a run")
    try:
        tensors = load_file(file)
    except SafetensorError as fault:
        raise ValueError(f"{file} cannot be read: {fault}; export the adapter again") from fault
    if missing := sorted(adapted.parameters.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {missing[0]}; attach the adapter and the model it was exported from")
    adapted.write(tensors)
