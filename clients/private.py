"""Private training of one client where no wave can: gradients of single examples by one of three ways, clipped, summed, noised.

way    time  adapters (presets, and `sparse` and `ravan` of strategies)
hooks  1.1   lora rslora bias head ln_tuning prefix; at 3 times: lora_sb ravan sparse; full but for learned positions. Opacus' hooks
vmap   1.2   those, full, adalora boft dora fourierft hra ia3 lokr miss oft p_tuning prompt vblora vera. The whole model, mapped
loop   1.9   those, bottleneck c3a loha randlora shira visual_prompt: all that trains. One example after the other

The time is over that of plain training. docs/privacy_backends.md has the table by model. None is taken on trust: `choose` compares a way
with the loop before it is used.
"""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from clients.coupling import coupled
from clients.train import Job, Private, finished, optimizer
from fedpeft.adapters.base import Adapted, precision
from fedpeft.messages import Update
from fedpeft.models.base import Examples, in_batches
from fedpeft.models.masks import every_mask_made
from fedpeft.models.score import losses
from fedpeft.privacy.mechanism import add_noise, clip_each
from fedpeft.strategy import Phase
from fedpeft.tensors import Tensors

log = logging.getLogger("fedpeft")

Way = Literal["hooks", "vmap", "loop"]
Backend = Literal["auto", "hooks", "vmap", "loop"]
Moving = dict[str, nn.Parameter]

MEMORY = 512 << 20  # bytes of single examples' gradients at once; beside a model of 100 MB or more it is little
JUDGED = 2  # steps after which something must have moved
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}  # of the base's dtype; rounding alone reaches a tenth of it
HALF = 0.1  # in half precision rounding reaches 1e-2, and what is wrong is wrong by its whole size
OPACUS = ("grad_sample", "_forward_counter", "_current_grad_sample", "_norm_sample")  # what it hangs on parameters


def train_private(
    adapted: Adapted, phase: Phase, examples: Examples, job: Job, *, round: int, backend: Backend = "auto", batch: int = 32
) -> tuple[Update, Tensors]:
    """Trains one client whose job is private and gives what it shares and what it keeps; `clients.train.train`'s counterpart.

    `batch` is the most examples that run at once; fewer do where their gradients would take more than `MEMORY`. Raises `ValueError` for a
    backend that cannot do this adapter, and if nothing moved.
    """
    assert job.private is not None
    began = time.perf_counter()
    start, private, device = job.start, job.private, adapted.base.device
    with adapted.rescaled(job.scales), adapted.shifted(job.broadcast.base_delta):
        adapted.fill(start, any_rank=job.scales is not None)
        way = _chosen(adapted, examples, job.rows, phase, backend)
        moving = adapted.select(phase.trains)
        before = {name: parameter.detach().clone() for name, parameter in moving.items()}
        here = {name: tensor.to(device) for name, tensor in start.items()} if phase.loss else {}
        descent = optimizer(moving, job.work)
        drawn = list(private.draw(job.rows))[: 1 if phase.work == "gradient" else None]
        for step, rows in enumerate(drawn):
            grads = _noised(clipped_sums(adapted, examples, rows, moving, way, clip=private.clip, batch=batch), private, start)
            if phase.work == "gradient":
                _step_in_boundary_values(adapted, moving, grads)
            else:
                if phase.loss:
                    grads = _with_term(grads, moving, phase.loss({name: adapted.value(name, start) for name in moving}, here))
                _step(descent, moving, grads, job.work.clip)
            if step == min(JUDGED, len(drawn)) - 1 and (private.noise_multiplier or any(len(some) for some in drawn[: step + 1])):
                _check_moved(before, moving, job.client, round)
        end = adapted.read(start)
    return finished(phase, job, end, [], len(drawn), time.perf_counter() - began)


def clipped_sums(
    adapted: Adapted, examples: Examples, rows: Tensor, moving: Moving, way: Way, *, clip: float, batch: int = 32
) -> Tensors:  # fmt: skip
    """The sum of the gradients of `rows` (it may be empty), each clipped to `clip` over all moving tensors together; float32 at least."""
    sums = {name: torch.zeros(p.shape, dtype=precision(p), device=p.device) for name, p in moving.items()}
    bytes_each = sum(total.numel() * total.element_size() for total in sums.values())
    size = max(1, min(batch, MEMORY // bytes_each))
    for some in in_batches(examples, rows, size) if len(rows) else ():
        each, _ = per_example(adapted, examples, some, moving, way)
        clip_each(each, clip)
        for name, part in each.items():
            sums[name] += part.sum(0, dtype=sums[name].dtype)
    return sums


def per_example(adapted: Adapted, examples: Examples, rows: Tensor, moving: Moving, way: Way) -> tuple[Tensors, Tensor]:
    """The gradients (b, ...) of each row's own loss in the tensors `moving`, as `adapted.select` gave them, and the losses (b,)."""
    grads, each = {"hooks": _hooks, "vmap": _vmap, "loop": _loop}[way](adapted, examples, rows, moving)
    for name, parameter in moving.items():
        if grads[name].shape != (len(rows), *parameter.shape):
            raise ValueError(f"{name} is {tuple(parameter.shape)}, its gradients for {len(rows)} examples are {tuple(grads[name].shape)}")
    return grads, each.detach()


def choose(adapted: Adapted, examples: Examples, rows: Tensor, phase: Phase, backend: Backend) -> Way | None:
    """The way that will be used: the cheapest that agrees with the loop on two of the rows, the shortest and the longest.

    None if they show nothing, because one has a gradient that is no number: the loop is right for now. Raises `ValueError` for a way asked
    for by name that fails or differs. Nothing of the two examples is released.
    """
    if backend == "loop":
        return "loop"
    if not len(rows):  # without examples there is no gradient to take
        return None
    moving = adapted.select(phase.trains)
    pair = rows[examples.lengths()[rows].argsort(stable=True)][[0, -1]]
    causes: list[str] = []
    tried: tuple[Way, ...] = ("hooks", "vmap") if backend == "auto" else (backend,)
    if backend == "auto" and (slow := _without_formula(adapted)):
        causes.append(f"hooks: Opacus has no formula for {slow} and maps it anew, which takes longer than the loop")
        tried = ("vmap",)
    with _nowhere_zero(adapted):
        want, _ = _loop(adapted, examples, pair, moving)
        if not all(bool(part.isfinite().all()) for part in want.values()):
            log.info("gradients of single examples one by one: those to compare with are no numbers")
            return None
        for way in tried:
            cause = _fault(adapted, examples, pair, moving, way, want)
            if not cause:
                log.info("gradients of single examples by %s%s", way, f" ({'; '.join(causes)})" if causes else "")
                return way
            causes.append(f"{way}: {cause}")
    if backend != "auto":
        raise ValueError(f"privacy.backend={backend} cannot do this adapter: {causes[0]}; set privacy.backend=auto or loop")
    log.info("gradients of single examples one by one (%s)", "; ".join(causes))
    return "loop"


_TESTED: WeakKeyDictionary[Adapted, dict[tuple[Backend, frozenset[str]], Way]] = WeakKeyDictionary()


def _chosen(adapted: Adapted, examples: Examples, rows: Tensor, phase: Phase, backend: Backend) -> Way:
    """`choose`, once for an adapter and the tensors it trains."""
    moving = adapted.select(phase.trains)
    if not moving:
        raise ValueError("this round trains no tensor of the adapter; choose another adapter= or strategy=")
    known, key = _TESTED.setdefault(adapted, {}), (backend, frozenset(moving))
    if key not in known:
        way = choose(adapted, examples, rows, phase, backend)
        if way is None:  # nothing was tested: the next batch is asked again
            return "loop"
        known[key] = way
    return known[key]


def _fault(adapted: Adapted, examples: Examples, pair: Tensor, moving: Moving, way: Way, want: Tensors) -> str:
    """Why this way is not to be used, where `want` is the loop's; it names no number that the examples made."""
    try:
        got, _ = per_example(adapted, examples, pair, moving, way)
        mixes = way == "hooks" and coupled(adapted, examples, int(pair[0]), moving)  # the other ways run the model on one example
    except Exception as fault:  # of Opacus, functorch or any layer: what cannot be done is found by doing it
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
    bound = TOLERANCE.get(next(adapted.base.module.parameters()).dtype, HALF)
    for k in range(len(pair)):
        there = {name: part[k].double() for name, part in want.items()}
        whole = torch.stack([part.square().sum() for part in there.values()]).sum().sqrt()
        for name, part in there.items():  # some gradients are truly zero, a BERT's of its keys' bias: there rounding is all there is
            if not (got[name][k].double() - part).norm() <= bound * (part.norm() + whole):
                return f"its gradient of {name} is not the loop's"
    return "the gradient of an example changes with the others of its batch" if mixes else ""


@contextmanager
def _nowhere_zero(adapted: Adapted) -> Iterator[None]:
    """With small numbers in tensors that are all zero: while LoRA's B is zero so is the gradient of its A, and shows no mistake."""
    zero = [parameter.data for parameter in adapted.parameters.values() if parameter.is_floating_point() and not parameter.any()]
    try:
        for tensor in zero:
            tensor.copy_(0.01 * torch.arange(tensor.numel(), dtype=torch.float64).cos().view(tensor.shape))
        yield
    finally:
        for tensor in zero:
            tensor.zero_()


# The three ways


def _losses(adapted: Adapted, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return losses(adapted.base.task, adapted.logits(inputs), targets.to(adapted.base.device))


def _loop(adapted: Adapted, examples: Examples, rows: Tensor, moving: Moving) -> tuple[Tensors, Tensor]:
    made, each = _zeros(len(rows), moving), []
    for k, row in enumerate(rows):
        loss = _losses(adapted, *examples.batch(row.view(1))).sum()
        each.append(loss.detach())
        found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True) if loss.requires_grad else [None] * len(moving)
        for name, grad in zip(moving, found, strict=True):
            if grad is not None:
                made[name][k] = grad
    return made, torch.stack(each)


def _vmap(adapted: Adapted, examples: Examples, rows: Tensor, moving: Moving) -> tuple[Tensors, Tensor]:
    """The gradient of one example's loss as a function, mapped over the batch; it needs every tensor in a module, under some name."""
    called = _Called(adapted)
    places: dict[int, list[str]] = {}
    for path, inner in called.named_modules():  # each once: one that several layers share, as VB-LoRA's bank, would not be put back
        for part, parameter in inner.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(f"{path}.{part}")
    if lost := [name for name, parameter in moving.items() if id(parameter) not in places]:
        raise ValueError(f"{lost[0]} lies in no module of the model")

    def loss(tensors: Tensors, inputs: dict[str, Tensor], target: Tensor) -> Tensor:
        laid = {place: tensor for name, tensor in tensors.items() for place in places[id(moving[name])]}
        alone = {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}
        each: Tensor = functional_call(called, laid, (alone, target.unsqueeze(0)), tie_weights=False)
        return each.sum()

    inputs, targets = examples.batch(rows)
    here = {name: tensor.to(adapted.base.device) for name, tensor in inputs.items()}
    with every_mask_made(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # attention on the CPU, row by row: it is measured
        mapped = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="same")  # LoKr draws for a dropout that is off
        grads, each = mapped({name: p.detach() for name, p in moving.items()}, here, targets.to(adapted.base.device))
    return {name: grad.contiguous() for name, grad in grads.items()}, each  # one that is nowhere used comes expanded


class _Called(nn.Module):
    """The model's losses as a module, so that its tensors can be laid in from outside."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__()
        self.inner = adapted.module or adapted.base.module
        self._adapted = adapted
        self.training = False

    def forward(self, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return _losses(self._adapted, inputs, targets)


def _hooks(adapted: Adapted, examples: Examples, rows: Tensor, moving: Moving) -> tuple[Tensors, Tensor]:
    """Opacus' `wrap_model=False`: hooks on every layer that has a moving tensor, taken off again."""
    module, owners = adapted.module or adapted.base.module, _owners(adapted)
    modes = [inner.training for inner in owners]
    _without_traces(module, moving)
    try:
        for inner in owners:
            inner.training = True  # the hooks of others do nothing; itself alone: what it holds stays without dropout
        _opacus()(module, loss_reduction="sum")
        each = _losses(adapted, *examples.batch(rows))
        with warnings.catch_warnings():  # of the lowest layer, whose input needs no gradient
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            each.sum().backward()
        return {name: _recorded(name, parameter, len(rows)) for name, parameter in moving.items()}, each
    finally:
        for inner, mode in zip(owners, modes, strict=True):
            inner.training = mode
        _without_traces(module, moving)


def _owners(adapted: Adapted) -> list[nn.Module]:
    """The layers that themselves hold a tensor that moves."""
    module = adapted.module or adapted.base.module
    return [inner for inner in module.modules() if any(p.requires_grad for p in inner.parameters(recurse=False))]


def _without_formula(adapted: Adapted) -> str:
    """The kind of a layer that Opacus has no formula for; empty if it has one for all."""
    known = _opacus().GRAD_SAMPLERS
    return next((type(inner).__name__ for inner in _owners(adapted) if type(inner) not in known), "")


def _opacus() -> Any:
    """Opacus' hooks. Importing it sets up the root logger of the whole process, which is not its own."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    from opacus.grad_sample import GradSampleHooks

    root.handlers[:] = handlers
    return GradSampleHooks


def _recorded(name: str, parameter: nn.Parameter, examples: int) -> Tensor:
    found = getattr(parameter, "grad_sample", None)
    if found is None and parameter.grad is None:
        return torch.zeros(examples, *parameter.shape, dtype=parameter.dtype, device=parameter.device)
    if not isinstance(found, Tensor):
        raise ValueError(f"Opacus' hooks record no gradients of {name}")
    return found.detach()


def _without_traces(module: nn.Module, moving: Moving) -> None:
    """Takes off what Opacus' hooks leave, also where they failed halfway."""
    for handle in vars(module).pop("autograd_grad_sample_hooks", []):
        handle.remove()
    for inner in module.modules():
        for trace in ("activations", "max_batch_len", "ft_compute_sample_grad"):
            vars(inner).pop(trace, None)
    for parameter in (*module.parameters(), *moving.values()):
        parameter.grad = None
        for trace in OPACUS:
            vars(parameter).pop(trace, None)


def _zeros(examples: int, moving: Moving) -> Tensors:
    return {name: torch.zeros(examples, *p.shape, dtype=p.dtype, device=p.device) for name, p in moving.items()}


# A step


def _noised(sums: Tensors, private: Private, start: Tensors) -> Tensors:
    """The noised sums over the expected size of a batch; entries that pad a smaller rank get no noise."""
    real = {name: total[tuple(slice(size) for size in start[name].shape)] for name, total in sums.items()}
    add_noise(real, private.deviation, private.source)
    return {name: total / private.expected for name, total in sums.items()}


def _with_term(grads: Tensors, moving: Moving, term: Tensor) -> Tensors:
    """The noised gradients with those of the phase's own term, which sees no data."""
    more = torch.autograd.grad(term, list(moving.values()), allow_unused=True)
    return {name: grads[name] if add is None else grads[name] + add for name, add in zip(moving, more, strict=True)}


def _step(descent: torch.optim.Optimizer, moving: Moving, grads: Tensors, clip: float | None) -> None:
    for name, parameter in moving.items():
        parameter.grad = torch.empty_like(parameter).copy_(grads[name])  # a fused kernel reads it in the parameter's own order of memory
    if clip is not None:
        nn.utils.clip_grad_norm_(moving.values(), clip)
    descent.step()


@torch.no_grad()
def _step_in_boundary_values(adapted: Adapted, moving: Moving, grads: Tensors) -> None:
    """A step of rate 1: dL/d(s p) = dL/dp / s, and p = value / s."""
    for name, parameter in moving.items():
        parameter.sub_((grads[name] / adapted.scales.get(name, 1.0) ** 2).to(parameter.dtype))


def _check_moved(before: Tensors, moving: Moving, client: int, round: int) -> None:
    if all(torch.equal(before[name], parameter) for name, parameter in moving.items()):
        raise ValueError(
            f"client {client}, round {round}: nothing moved in the first private steps, though gradients or noise were there; "
            "is train.lr 0, or does the model compute with other tensors than the adapter's?"
        )
