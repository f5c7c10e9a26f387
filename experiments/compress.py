"""`fedpeft compress` and `decompress`: ComPEFT for any PEFT adapter on disk (Yadav et al., https://arxiv.org/abs/2311.13171).

The file is a safetensors file: the ternary bits, what is kept as it is (a trained head), and in its metadata the config of the adapter, the
layout of what the bits stand for, and the fields of the codec. Nothing in it is executed.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fedpeft.codecs.base import header, layout, parse
from fedpeft.codecs.ternary import Ternary
from fedpeft.config import ConfigError
from fedpeft.tensors import Tensors, nbytes

FORMAT = "fedpeft compressed adapter 1"
STARTS_AT_ONE = ("IA3",)  # whose vectors multiply: what training changed is the distance from one
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Pressed:
    """What a compression gave: bytes before (as stored) and after, entries that were compressed, and their relative error."""

    before: int
    after: int
    entries: int
    bits: float  # an entry
    error: float  # relative, Euclidean

    def __str__(self) -> str:
        return (
            f"{self.before:,} bytes to {self.after:,}: {self.before / self.after:.1f} times smaller; {self.entries:,} entries at "
            f"{self.bits:.3f} bits, relative error {self.error:.3f}"
        )


def compress(folder: Path, to: Path, codec: Ternary) -> Pressed:
    """Writes the adapter in `folder` to the file `to`. Raises `ConfigError` for what is no adapter."""
    config, tensors = _read(folder)
    kept = {name: tensor for name, tensor in tensors.items() if _is_whole(name, config) or not tensor.is_floating_point()}
    moved = {name: tensor.float() - _start(config) for name, tensor in tensors.items() if name not in kept}
    if not moved:
        raise ConfigError(f"{folder} holds nothing but whole modules; there is no adapter to compress")
    data = codec.encode(moved)
    said = codec.decode(data, layout(moved))
    facts = {
        "format": FORMAT, "config": json.dumps(config), "layout": header(layout(moved)), "codec": json.dumps(dataclasses.asdict(codec)),
        "dtypes": json.dumps({name: str(tensors[name].dtype).removeprefix("torch.") for name in moved}),
    }  # fmt: skip
    if to.is_dir():
        raise ConfigError(f"{to} is a folder; needed is the name of a file")
    to.parent.mkdir(parents=True, exist_ok=True)
    save_file({**kept, "ternary": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, to, metadata=facts)
    entries = sum(tensor.numel() for tensor in moved.values())
    lost = sum(float((moved[name] - said[name]).double().square().sum()) for name in moved)
    whole = sum(float(tensor.double().square().sum()) for tensor in moved.values())
    return Pressed(nbytes(tensors), to.stat().st_size, entries, 8 * len(data) / entries, (lost / whole) ** 0.5 if whole else 0.0)


def decompress(file: Path, to: Path) -> int:
    """Writes the adapter of a compressed `file` into the folder `to`, as stock peft reads it; gives the number of its tensors."""
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  a safetensors file is not a dict
    except (SafetensorError, OSError) as fault:
        raise ConfigError(f"{file} cannot be read: {fault}") from fault
    if facts.get("format") != FORMAT or "ternary" not in tensors:
        raise ConfigError(f"{file} is no compressed adapter ({facts.get('format')}); `fedpeft compress` writes them")
    try:
        config, kinds = json.loads(facts["config"]), json.loads(facts["dtypes"])
        codec = Ternary(**json.loads(facts["codec"]))
        moved = codec.decode(tensors.pop("ternary").numpy().tobytes(), parse(json.loads(facts["layout"])))
        back = {name: (tensor + _start(config)).to(getattr(torch, str(kinds[name]))) for name, tensor in moved.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ConfigError(f"{file} is corrupt: {fault}") from fault
    to.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **back}, to / WEIGHTS, metadata={"format": "pt"})
    (to / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return len(tensors) + len(back)


def _read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as fault:
        raise ConfigError(f"{folder} is no PEFT adapter: {fault}; give a folder with {CONFIG} and {WEIGHTS}") from fault


def _is_whole(name: str, config: dict[str, Any]) -> bool:
    """True for a module that was trained whole: its start is not known here, so its change is not."""
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def _start(config: dict[str, Any]) -> float:
    return 1.0 if config.get("peft_type") in STARTS_AT_ONE else 0.0
