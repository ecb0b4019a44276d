"""Registers in the planted encoder: captured from tokens, prefixed to keys and values.

A few lines of their own, so that the planted answers do not rest on the graph passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Prefix = dict[int, tuple[Tensor, Tensor]]  # block -> keys, values [R, width]


def capture_register(model: Any, tokens: Tensor, start: int) -> Prefix:
    """Keys and values of `tokens` [R, width] in blocks from `start`, run on the tokens alone."""
    prefix: Prefix = {}
    hidden = tokens[None]
    for index, layer in list(enumerate(model.encoder.layer))[start:]:
        normed = layer.norm1(hidden)[0]
        prefix[index] = (layer.attention.k_proj(normed), layer.attention.v_proj(normed))
        hidden = layer(hidden)
    return prefix


@contextmanager
def prefixed(model: Any, prefix: Prefix) -> Iterator[None]:
    """Let every attention of the prefix's blocks see its keys and values, never as queries."""
    attentions = {index: model.encoder.layer[index].attention for index in prefix}
    for index, attention in attentions.items():
        attention.forward = _attend_with(attention, *prefix[index])
    try:
        yield
    finally:
        for attention in attentions.values():
            del attention.forward  # the class's own shows again


def _attend_with(attention: Any, keys: Tensor, values: Tensor) -> Any:
    def forward(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        k = torch.cat([keys.expand(len(x), -1, -1), attention.k_proj(x)], dim=1)
        v = torch.cat([values.expand(len(x), -1, -1), attention.v_proj(x)], dim=1)
        q, k, v = (split_heads(attention, states) for states in (attention.q_proj(x), k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return attention.o_proj(mixed.transpose(1, 2).flatten(2)), None

    return forward


def split_heads(attention: Any, states: Tensor) -> Tensor:
    return states.view(*states.shape[:2], attention.num_attention_heads, -1).transpose(1, 2)
