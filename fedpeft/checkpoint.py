"""Checkpoint: everything the next round needs, in one file that appears whole or not at all.

Any strategy's state becomes tensors and a JSON skeleton without the strategy's help: a state is built of tensors, numbers, strings,
mappings, tuples and frozen dataclasses. Only dataclasses that the reader names are ever built.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedpeft.codecs.raw import raw_bytes
from fedpeft.tensors import Tensors

FORMAT = "fedpeft 1"
FREE = "Free disk space; what was written before is kept, continue with `fedpeft run --resume` and the run's folder"


@dataclass(frozen=True)
class Checkpoint:
    """The state before `round`, and facts that must survive (totals, measured constants)."""

    round: int
    state: Any
    facts: Mapping[str, Any]


def save(checkpoint: Checkpoint, folder: Path, *, keep: int) -> Path:
    """Writes `folder`/round-<round>.safetensors and removes all but the newest `keep`."""
    tensors, skeleton = freeze(checkpoint.state)
    text = json.dumps({"round": checkpoint.round, "skeleton": skeleton, "names": list(tensors), "facts": dict(checkpoint.facts)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    seal(path, {f"t{index}": tensor for index, tensor in enumerate(tensors.values())}, text, synced=True)
    for old in [*found(folder)[:-keep], *folder.glob("*.partial")]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("round-*.safetensors"))


def round_of(path: Path) -> int:
    """The round that a checkpoint's run goes on with."""
    return int(path.stem.rpartition("-")[2])


def read(path: Path, known: Iterable[type]) -> Checkpoint:
    """The checkpoint at `path`; dataclasses of the state are built only if they are in `known`.

    `ValueError` if a single bit is not as written.
    """
    try:
        named, text = unseal(path)
        made = json.loads(text)
    except ValueError as fault:
        remedy = "; delete it to resume from the one before, which ends in the same adapter" if "corrupt" in str(fault) else ""
        raise ValueError(f"{fault}{remedy}") from fault
    tensors = {name: named[f"t{index}"] for index, name in enumerate(made["names"])}
    return Checkpoint(made["round"], thaw(tensors, made["skeleton"], {_kind(cls): cls for cls in known}), made["facts"])


def freeze(value: Any, at: str = "") -> tuple[Tensors, Any]:
    """(tensors, JSON skeleton) of a state."""
    if isinstance(value, Tensor):
        return {at: value}, {"tensor": at}
    if value is None or isinstance(value, bool | int | float | str):
        return {}, {"value": value}
    items: list[tuple[Any, Any]]
    if is_dataclass(value) and not isinstance(value, type):
        kind, items = _kind(type(value)), [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, tuple):
        kind, items = "tuple", list(enumerate(value))
    elif isinstance(value, Mapping):
        kind, items = "dict", list(value.items())
    else:
        raise TypeError(
            f"state holds a {type(value).__name__} at {at or 'its root'}; "
            "a state is made of tensors, numbers, dicts, tuples and dataclasses"
        )
    tensors: Tensors = {}
    rows = []
    for key, item in items:
        inside, skeleton = freeze(item, f"{at}|{key!r}")  # quoted: 1 is not "1", and "a|b" is not b inside a
        tensors |= inside
        rows.append([key, skeleton])
    return tensors, {"kind": kind, "items": rows}


def thaw(tensors: Tensors, skeleton: Any, known: Mapping[str, type]) -> Any:
    """The state of `freeze`'s result; only classes in `known` (by module and name) are built."""
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]]
    if "value" in skeleton:
        return skeleton["value"]
    items = [(key, thaw(tensors, part, known)) for key, part in skeleton["items"]]
    if skeleton["kind"] == "tuple":
        return tuple(item for _, item in items)
    if skeleton["kind"] == "dict":
        return dict(items)
    if skeleton["kind"] not in known:
        raise ValueError(
            f"the checkpoint holds a {skeleton['kind']}, this run's strategy does not; resume with the config it was made with"
        )
    return known[skeleton["kind"]](**dict(items))


def classes_in(value: Any) -> set[type]:
    """The dataclasses a state is made of: what a checkpoint of the same strategy may build."""
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value)}.union(*(classes_in(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, Mapping):
        return set().union(*map(classes_in, value.values()))
    return set().union(*map(classes_in, value)) if isinstance(value, tuple) else set()


def seal(path: Path, tensors: Tensors, text: str, *, synced: bool) -> None:
    """Writes tensors and a text to one file that appears whole or not at all, with a checksum over everything.

    `synced` waits until the disk has it, so that it also survives a loss of power.
    """
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(_unshared(named), partial, metadata={"format": FORMAT, "text": text, "digest": _digest(named, FORMAT + text)})
    except SafetensorError as fault:  # how it reports a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {fault}. {FREE}") from fault
    if synced:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    partial.replace(path)


def unseal(path: Path) -> tuple[Tensors, str]:
    """What `seal` wrote; `ValueError` naming the file if a single bit is not as written."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is not a dict
        ok = facts["digest"] == _digest(named, facts["format"] + facts["text"])
    except (SafetensorError, KeyError, OSError) as fault:
        raise ValueError(f"{path} is corrupt ({fault})") from fault
    if not ok:
        raise ValueError(f"{path} is corrupt (its checksum does not match)")
    if facts["format"] != FORMAT:
        raise ValueError(f"{path} was written by another version of fedpeft ({facts['format']}, here {FORMAT}); resume with that version")
    return named, facts["text"]


def _unshared(named: Tensors) -> Tensors:
    """safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    out: Tensors = {}
    for name, tensor in named.items():
        out[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return out


def _digest(named: Tensors, text: str) -> str:
    made = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(named):
        made.update(f"{name} {named[name].dtype} {tuple(named[name].shape)}".encode())
        made.update(raw_bytes(named[name]))
    return made.hexdigest()


def _kind(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"
