"""Passport: what server and client must have alike before round 1, and what a client says of itself beside that.

A client says it of itself: this finds another model or version by mistake, not a client that lies.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata

import torch
from torch import Tensor

from fedpeft.data.table import Inputs, Table
from fedpeft.lowrank import rank_of
from fedpeft.models.base import Base
from fedpeft.tensors import Tensors

WIRE = 1  # raised with every change of a message that who does not know it would misread
LONGEST = 200  # letters shown of what a client said
PROBE = "Ein naïve café: 3.14 €, (x_1 != y2)? “Ça va” — 你好, мир!\n\tTHE END of AbC's re-run; don't. " * 20  # past most limits of length
ADVICE = {
    "fedpeft": "install the same fedpeft at both",
    "wire": "install the same fedpeft at both",
    "base": "give both the same model.id and model.revision, and of a tiny model the same folder: each host makes one in $FEDPEFT_CACHE",
    "dtype": "set the same model.dtype at both",
    "reads": "give both the same model.id, model.revision and model.max_length, and the same transformers",
    "layout": "set the same strategy=, adapter= and adapter.rank at both, and install the same peft",
    "classes": "give both the same data.class_names, in one order",
    "asks": "install the same fedpeft at both, with the same presets; a site's data.task decides on the codec, too",
}


@dataclass(frozen=True)
class Passport:
    """`rank` and `examples` are a client's own; all else must be alike."""

    fedpeft: str  # version
    wire: int  # version of the messages
    base: str  # fingerprint of the frozen weights
    dtype: str  # of most of them, and how they are quantized
    reads: str  # digest of the tokenizer, or of what the processor makes of an image
    layout: str  # digest of the adapters' tensors: names, dtypes, shapes
    modules: str  # the same in words
    rank: int = 0  # largest that is sent, or that is taken; 0: any
    examples: int = 0  # of the client, cut to a power of ten; 0: not said
    classes: str = ""  # how many the head tells apart, and a digest of their names in order
    asks: str = ""  # what the run's words come to with the presets that are installed: the chosen ones, and a digest of all

    def facts(self) -> dict[str, str | int]:
        """Plain values for a message."""
        return asdict(self)

    def differences(self, other: "Passport", *, whose: str = "it") -> list[str]:
        """What keeps `other`, a client's, out of the run of this one, the server's: one sentence each; none if it fits."""
        found = []
        for name, advice in ADVICE.items():
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                both = _apart(self.modules, other.modules, whose) if name == "layout" else None
                found.append(f"{name}: {both or f'the server has {_shown(mine)}, {whose} has {_shown(its)}'}; {advice}")
        if self.layout == other.layout and other.rank and self.rank > other.rank:
            found.append(f"rank: the server sends rank {self.rank}, {whose} takes at most {other.rank}; give it that rank in devices=")
        return found


def passport(base: Base, starts: Mapping[str, Tensors], like: Inputs, classes: Sequence[str] = (), asks: str = "") -> Passport:
    """That of a process with this base, these adapters' tensors, these classes; `like` is an input of the kind that the data have, `asks`
    what the run's words came to.
    """
    exact = hashlib.blake2b(digest_size=12)
    for adapter, tensors in sorted(starts.items()):
        for name, tensor in sorted(tensors.items()):
            exact.update(f"{adapter} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    return Passport(
        version(), WIRE, base.fingerprint, _dtype(base), _reads(base, like), exact.hexdigest(), _modules(starts),
        max((rank_of(tensors) for tensors in starts.values()), default=0),
        classes=f"{len(classes)} named {hashlib.blake2b(json.dumps(list(classes)).encode(), digest_size=6).hexdigest()}",
        asks=asks,
    )  # fmt: skip


def read_passport(facts: Mapping[str, object]) -> Passport:
    """The passport in a message's facts. They are hostile: `ValueError` for one that is missing or of another type."""
    kinds = {field.name: int if field.name in ("wire", "rank", "examples") else str for field in fields(Passport)}
    if missing := sorted(kinds.keys() - facts.keys()):
        raise ValueError(f"it does not say its {', '.join(missing)}: an older fedpeft than {version()}; install the same at both")
    for name, kind in kinds.items():
        value = facts[name]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(f"its {name} is {_shown(value)}, needed is {'text' if kind is str else 'a whole number of at least 0'}")
    return Passport(**{name: facts[name] for name in kinds})  # type: ignore[arg-type]  # checked above


def version() -> str:
    """The version of fedpeft that is installed here."""
    try:
        return metadata.version("fedpeft")
    except metadata.PackageNotFoundError:
        return "not installed"


def size_class(examples: int) -> int:
    """The power of ten that a data set of so many examples reaches: 742 examples are of the class 100."""
    return int(10 ** (len(str(examples)) - 1)) if examples > 0 else 0


def _dtype(base: Base) -> str:
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in base.module.named_parameters():
        if name not in base.head:
            sizes[parameter.dtype] += parameter.numel()
    most = max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)), default="none")
    quantized = getattr(getattr(base.module, "config", None), "quantization_config", None)
    return str(most).removeprefix("torch.") + (f", quantized: {getattr(quantized, 'quant_method', quantized)}" if quantized else "")


def _reads(base: Base, like: Inputs) -> str:
    """Digest of the vocabulary, and of what becomes of one odd text; or of an image, whose pixels may differ in their last bits."""
    inputs: Inputs
    if isinstance(like, Tensor):
        inputs = torch.linspace(0, 1, like[0].numel()).reshape(1, *like.shape[1:])
    else:
        inputs = ((PROBE, PROBE),) if isinstance(like[0], tuple) else (PROBE,)
    encoded, _ = base.encode(Table(inputs, torch.zeros(1, dtype=torch.long))).batch(torch.zeros(1, dtype=torch.long))
    made = hashlib.blake2b(base.vocabulary.encode(), digest_size=12)
    for name, tensor in sorted(encoded.items()):
        made.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            about = tensor.double()
            made.update(" ".join(f"{float(x):.3g}" for x in (about.mean(), about.std(), about.min(), about.max())).encode())
        else:
            made.update(tensor.long().numpy().tobytes())
    return made.hexdigest()


def _modules(starts: Mapping[str, Tensors]) -> str:
    """Tensors of every adapter, those of numbered layers together: `main: layer.*.query.A float32 8x64 (3); ...`."""
    kinds: Counter[str] = Counter()
    for adapter, tensors in sorted(starts.items()):
        for name, tensor in sorted(tensors.items()):
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            kinds[f"{adapter}: {re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', name)} {str(tensor.dtype).removeprefix('torch.')} {shape}"] += 1
    return "; ".join(f"{kind} ({count})" for kind, count in kinds.items())


def _apart(mine: str, its: str, whose: str) -> str | None:
    """What only one of two descriptions has, one example of each."""
    ours, theirs = ([part for part in a.split("; ") if part not in b.split("; ")] for a, b in ((mine, its), (its, mine)))
    if not ours and not theirs:
        return None
    return " and ".join(f"only {who} has {_few(parts)}" for who, parts in (("the server", ours), (whose, theirs)) if parts)


def _few(parts: list[str]) -> str:
    return _shown(parts[0]) + (f" (and {len(parts) - 1} more)" if len(parts) > 1 else "")


def _shown(value: object) -> str:
    """For an error message: short, and without what would move a terminal's cursor."""
    text = value if isinstance(value, str) and value.isprintable() and value else ascii(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
