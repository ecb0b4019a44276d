"""Forward functions that trace to static graphs, to put in place of the libraries' own.

Traced as they are, the libraries expand tokens to the batch (Shape, Expand), resize positions
(Resize), and mask or fuse attention. These compute the same numbers from constants.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def softmax_attention(query: "Tensor", key: "Tensor", value: "Tensor", scale: float) -> "Tensor":
    """Attention as a softmax between two matmuls; the scale goes into the query.

    query [B or 1, heads, Tq, d], key and value [B, heads, T, d] -> [B, Tq, heads * d].
    """
    import torch

    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    mixed: Tensor = torch.matmul(torch.softmax(scores, dim=-1), value)
    return mixed.transpose(1, 2).flatten(2)


def split_heads(tokens: "Tensor", heads: int) -> "Tensor":
    """[B, T, heads * d] -> [B, heads, T, d]."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def freeze_tokens(
    module: "nn.Module", patches: "Callable[[Any], Tensor]", table: "Tensor"
) -> "Callable[..., Tensor]":
    """An embedding that adds a constant to the patches, padded where the other tokens go.

    `patches` yields [B, N, C]. `table` [1, T, C], kept as a buffer of `module`, holds the
    embedded T - N leading tokens (class, registers) and the position of every patch.
    """
    from torch.nn import functional

    module.register_buffer("token_table", table.detach().clone(), persistent=False)

    def embed(images: Any, **_: Any) -> "Tensor":
        tokens = patches(images)
        constant = module.get_buffer("token_table")
        return functional.pad(tokens, (0, 0, constant.shape[1] - tokens.shape[1], 0)) + constant

    return embed


def freeze_multihead(attention: "nn.MultiheadAttention", probe: "Tensor | None" = None) -> None:
    """Give a batch-first nn.MultiheadAttention a plain forward, its packed projection split in 3.

    `probe` [1, Tq, C] stands for the query of every image, and is projected here, once.
    """
    from torch import nn

    packed = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
        linear = nn.Linear(attention.embed_dim, attention.embed_dim, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = nn.Parameter(bias, requires_grad=False)
        attention.add_module(name, linear)

    def project(name: str, tokens: "Tensor") -> "Tensor":
        return split_heads(attention.get_submodule(name)(tokens), attention.num_heads)

    if probe is not None:
        attention.register_buffer("probe_query", project("q_proj", probe), persistent=False)

    def forward(query: "Tensor", key: "Tensor", value: "Tensor", **_: Any) -> Any:
        queries = project("q_proj", query) if probe is None else attention.get_buffer("probe_query")
        keys, values = project("k_proj", key), project("v_proj", value)
        mixed = softmax_attention(queries, keys, values, attention.head_dim**-0.5)
        return attention.out_proj(mixed), None

    attention.forward = forward  # type: ignore[method-assign, assignment]
