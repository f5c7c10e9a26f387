"""Casts: what was read from text, as the types that were there before want it. A value of another kind is a fault, and changes nothing."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

WORDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def alike(plain: Mapping[str, Any], usual: Mapping[str, Any], at: str, faults: list[str]) -> dict[str, Any]:
    """`plain`, in which fields stay fields, and inside a preset (where no dataclass knows the types) numbers and flags stay such."""
    made = dict(plain)
    for name, before in usual.items():
        value, needed = plain[name], None
        if isinstance(before, dict) and isinstance(value, dict):
            made[name] = alike(value, before, f"{at}{name}.", faults) if at else value
        elif isinstance(before, dict):
            needed = f"fields, such as {at}{name}.{next(iter(before), 'name')}=..."
        elif at and isinstance(before, bool) and not isinstance(value, bool):
            needed = WORDS[bool]
        elif at and _is_number(before) and not _is_number(value):
            needed = WORDS[float]
        elif at and isinstance(before, int) and isinstance(value, float) and _is_number(before):
            needed = WORDS[int]
        if needed:
            faults.append(f"{at}{name}={value}: needed {'are' if isinstance(before, dict) else 'is'} {needed}")
            made[name] = before
    return made


def cast(cls: type, name: str, value: Any, usual: Any, shown: str, faults: list[str]) -> Any:
    """`value` as the field `name` of the dataclass `cls` takes it; else a fault, and the usual value."""
    kind = next(f.type for f in fields(cls) if f.name == name)
    kinds: tuple[type, ...] = tuple(a if isinstance(a, type) else str for a in get_args(kind)) or (
        (kind,) if isinstance(kind, type) else (str,)
    )
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        faults.append(f"{shown}={value}: needed is {' or '.join(WORDS[k] for k in kinds)}")
        return usual
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
