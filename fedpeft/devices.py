"""Devices: which rank and alpha each client's device takes.

`devices=[2,4,8]` gives them out in turn; `devices={phone: {rank: 2, share: 0.7}, laptop: {rank: 8, alpha: 16, share: 0.3}}` by classes, to
a share of the clients or to `clients: [0, 5, 7]`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIELDS = ("rank", "alpha", "share", "clients")


@dataclass(frozen=True)
class Device:
    """What a client trains: `rank`, and `alpha` of its scale alpha / rank; None keeps the scale of the run's adapter."""

    rank: int
    alpha: float | None = None


def devices(spec: Any, *, clients: int, seed: int) -> tuple[Device, ...] | None:
    """The device of every client; None if all are alike. Raises `ValueError` that names the field as the user writes it."""
    if spec is None:
        return None
    if isinstance(spec, Mapping) and spec:
        return _classes(spec, clients, seed)
    if isinstance(spec, Sequence) and not isinstance(spec, str) and spec:
        turn = [Device(_rank(rank, f"devices[{i}]")) for i, rank in enumerate(spec)]
        return tuple(turn[client % len(turn)] for client in range(clients))
    raise ValueError(f"devices={spec}: needed is null, a list of ranks as [2,4,8], or classes as {{phone: {{rank: 2, share: 0.7}}, ...}}")


def _classes(spec: Mapping[str, Any], clients: int, seed: int) -> tuple[Device, ...]:
    found: dict[int, Device] = {}
    shared: list[tuple[Device, float]] = []
    for name, fields in spec.items():
        at = f"devices.{name}"
        if not isinstance(fields, Mapping) or not fields.keys() <= set(FIELDS) or ("share" in fields) == ("clients" in fields):
            raise ValueError(f"{at}={fields}: needed are rank, perhaps alpha, and either share (of the clients) or clients (a list)")
        device = _device(fields, at)
        if "share" in fields:
            shared.append((device, _positive(fields["share"], f"{at}.share", "a share of the clients, more than 0")))
            continue
        for client in fields["clients"] if isinstance(fields["clients"], Sequence) else [fields["clients"]]:
            if type(client) is not int or not 0 <= client < clients or client in found:
                raise ValueError(f"{at}.clients={fields['clients']}: needed are clients from 0 to {clients - 1}, each in one class")
            found[client] = device
    rest = [client for client in range(clients) if client not in found]
    whole = sum(share for _, share in shared)
    if rest and not shared:
        raise ValueError(f"devices: client {rest[0]} and {len(rest) - 1} more are in no class; give one class a share")
    if shared and whole > 1 + 1e-9:
        raise ValueError(f"devices: the shares add up to {whole:g}, needed is at most 1")
    if shared and (missing := len(rest) - whole * clients) > 0.5 + 1e-9:
        raise ValueError(f"devices: the shares add up to {whole:g}, which leaves about {missing:.0f} clients in no class; raise a share")
    from fedpeft import seeds  # it loads torch, which reading a config should not

    order = seeds.numpy_generator(seed, purpose="devices").permutation(len(rest))
    edge, at_ = 0.0, 0
    for device, share in shared:
        edge += share / whole
        for place in order[at_ : round(edge * len(rest))]:
            found[rest[place]] = device
        at_ = round(edge * len(rest))
    return tuple(found[client] for client in range(clients))


def _device(fields: Mapping[str, Any], at: str) -> Device:
    rank, alpha = _rank(fields.get("rank"), f"{at}.rank"), fields.get("alpha")
    return Device(rank, None if alpha is None else _positive(alpha, f"{at}.alpha", "a number more than 0"))


def _rank(value: Any, at: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{at}={value}: needed is a whole number of at least 1")
    return value


def _positive(value: Any, at: str, needed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{at}={value}: needed is {needed}")
    return float(value)
