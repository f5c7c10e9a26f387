"""Families of models: where each keeps its layers, and its last layer computed for one row alone.

A classifier reads one row of the last layer: the first token's (BERT, ViT) or the last token's (GPT-2, Llama). Keys and values are needed
of all tokens; the query, the output of attention and the MLP of that one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Row:
    """What the last layer must know of a micro-batch: which row is read, and which keys it may look at."""

    at: Tensor  # (N,) position of the row
    keys: Tensor | None  # (N, L) bool; None: all


Tail = Callable[[Any, Tensor, Row, dict[str, Any]], Tensor]  # (layer, (N, L, d), row, keyword arguments) -> (N, 1, d)


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its layers. Paths are below the model's `base_model_prefix`.

    A family is known by the very classes of its layers: what looks alike may scale its embeddings, leave out positions or slide a window.
    """

    kinds: tuple[str, ...]  # class names of the layers
    layers: str
    embedding: str  # what makes the first hidden state
    silent: tuple[str, ...]  # embeddings whose output is added to it afterwards
    tail: Tail
    reads_last: bool  # the classifier reads the last token's row, not the first's


def _attend(q: Tensor, k: Tensor, v: Tensor, size: int, row: Row, scale: float) -> Tensor:
    """Attention of one query each: q (N, 1, H size), k and v (N, L, G size) with G dividing H -> (N, 1, H size)."""
    q, k, v = (x.view(*x.shape[:2], -1, size).transpose(1, 2) for x in (q, k, v))
    return _attended(q, k, v, row, scale)


def _attended(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = None if row.keys is None else row.keys[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def taken(x: Tensor, row: Row) -> Tensor:
    """(N, 1, d): each sample's row."""
    return x[torch.arange(len(x), device=x.device), row.at].unsqueeze(1)


def _bert(layer: Any, hidden: Tensor, row: Row, arguments: dict[str, Any]) -> Tensor:
    own = layer.attention.self
    mine = taken(hidden, row)
    seen = _attend(own.query(mine), own.key(hidden), own.value(hidden), own.attention_head_size, row, own.scaling)
    out: Tensor = layer.feed_forward_chunk(layer.attention.output(seen, mine))
    return out


def _vit(layer: Any, hidden: Tensor, row: Row, arguments: dict[str, Any]) -> Tensor:
    own = layer.attention
    inside, mine = layer.layernorm_before(hidden), taken(hidden, row)
    seen = _attend(own.q_proj(taken(inside, row)), own.k_proj(inside), own.v_proj(inside), own.head_dim, row, own.scaling)
    mine = mine + own.o_proj(seen)
    out: Tensor = mine + layer.mlp(layer.layernorm_after(mine))
    return out


def _gpt2(layer: Any, hidden: Tensor, row: Row, arguments: dict[str, Any]) -> Tensor:
    own = layer.attn
    q, k, v = own.c_attn(layer.ln_1(hidden)).split(own.split_size, dim=2)  # one matrix for all three: q of the other rows is wasted
    mine = taken(hidden, row) + own.c_proj(_attend(taken(q, row), k, v, own.head_dim, row, own.scaling))
    out: Tensor = mine + layer.mlp(layer.ln_2(mine))
    return out


def _llama(layer: Any, hidden: Tensor, row: Row, arguments: dict[str, Any]) -> Tensor:
    own = layer.self_attn
    cos, sin = (x.expand(len(hidden), -1, -1) for x in arguments["position_embeddings"])
    inside, mine = layer.input_layernorm(hidden), taken(hidden, row)
    q = own.q_proj(taken(inside, row)).view(len(hidden), 1, -1, own.head_dim).transpose(1, 2)
    k, v = (make(inside).view(*hidden.shape[:2], -1, own.head_dim).transpose(1, 2) for make in (own.k_proj, own.v_proj))
    q, k = _turned(q, taken(cos, row), taken(sin, row)), _turned(k, cos, sin)
    mine = mine + own.o_proj(_attended(q, k, v, row, own.scaling))
    out: Tensor = mine + layer.mlp(layer.post_attention_layernorm(mine))
    return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (N, H, L, size) by angles (N, L, size)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


FAMILIES = (
    Family(("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer"), "encoder.layer", "embeddings", (), _bert, reads_last=False),
    Family(("ViTLayer",), "layers", "embeddings", (), _vit, reads_last=False),
    Family(("GPT2Block",), "h", "wte", ("wpe",), _gpt2, reads_last=True),
    Family(("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"), "layers", "embed_tokens", (), _llama, reads_last=True),
)
