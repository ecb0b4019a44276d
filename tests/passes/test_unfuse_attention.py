"""ONNX Runtime's attention operators apart: its own numbers, and blocks that are found."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.fused_nodes import Array, assert_unfused, draw_array, fused_graph, unfused
from support.running import run_feeds

from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft
from regcache.passes.walk import count_ops

SIZES = st.integers(1, 4)
SEEDS = st.integers(0, 99)
FLAGS = st.booleans()
ANY = examples(30)


@ANY
@given(SIZES, SIZES, SIZES, SIZES, SIZES, FLAGS, FLAGS, st.sampled_from([None, 0.3]), FLAGS, SEEDS)
def test_attention(
    batch: int, tokens: int, width: int, heads: int, size: int, bias: bool, mask: bool,
    scale: float | None, added: bool, seed: int,
) -> None:  # fmt: skip
    hidden = heads * size
    inputs: dict[str, Array | None] = {
        "x": draw_array(seed, batch, tokens, width),
        "weights": draw_array(seed + 1, width, 3 * hidden),
        "bias": draw_array(seed + 2, 3 * hidden) if bias else None,
        "mask": np.ones((batch, tokens), np.int32) if mask else None,
        "past": None,
        "attention_bias": draw_array(seed + 3, 1, heads, tokens, tokens) if added else None,
    }
    attributes = {"num_heads": heads} | ({} if scale is None else {"scale": scale})
    after = assert_unfused("Attention", inputs, ["weights", "bias", "mask"], **attributes)
    assert count_ops(after, "MatMul") == 3


@ANY
@given(SIZES, SIZES, SIZES, SIZES, SIZES, FLAGS, SEEDS)
def test_attention_with_values_of_another_width(
    tokens: int, width: int, heads: int, size: int, value_size: int, bias: bool, seed: int
) -> None:
    sizes = [heads * size, heads * size, heads * value_size]
    inputs = {
        "x": draw_array(seed, 2, tokens, width),
        "weights": draw_array(seed + 1, width, sum(sizes)),
        "bias": draw_array(seed + 2, sum(sizes)) if bias else None,
    }
    assert_unfused(
        "Attention", inputs, ["weights", "bias"], num_heads=heads, qkv_hidden_sizes=sizes
    )


@ANY
@given(SIZES, SIZES, SIZES, SIZES, SIZES, FLAGS, st.sampled_from([None, 0.3]), FLAGS, SEEDS)
def test_multi_head_attention(
    batch: int, tokens: int, others: int, heads: int, size: int, bias: bool,
    scale: float | None, added: bool, seed: int,
) -> None:  # fmt: skip
    hidden = heads * size
    inputs: dict[str, Array | None] = {
        "q": draw_array(seed, batch, tokens, hidden),
        "k": draw_array(seed + 1, batch, others, hidden),
        "v": draw_array(seed + 2, batch, others, hidden),
        "bias": draw_array(seed + 3, 3 * hidden) if bias else None,
        "mask": None,
        "attention_bias": draw_array(seed + 4, 1, heads, tokens, others) if added else None,
    }
    attributes = {"num_heads": heads} | ({} if scale is None else {"scale": scale})
    assert_unfused("MultiHeadAttention", inputs, ["bias"], **attributes)


def test_values_of_another_width() -> None:
    inputs: dict[str, Array | None] = {
        "q": draw_array(0, 2, 5, 6),
        "k": draw_array(1, 2, 5, 6),
        "v": draw_array(2, 2, 5, 12),
        "bias": draw_array(3, 24),
    }
    assert_unfused("MultiHeadAttention", inputs, ["bias"], num_heads=3)


def test_keys_and_values_by_head() -> None:
    inputs: dict[str, Array | None] = {
        "q": draw_array(0, 2, 5, 6),
        "k": draw_array(1, 2, 3, 4, 2),
        "v": draw_array(2, 2, 3, 4, 2),
    }
    assert_unfused("MultiHeadAttention", inputs, num_heads=3)


def by_hand(q: Array, k: Array, v: Array) -> Array:
    """Attention of [B, T, heads, D] in float64."""
    scores = np.einsum("bthd,bshd->bhts", q.astype(np.float64), k) / np.sqrt(q.shape[-1])
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhts,bshd->bthd", powers / powers.sum(-1, keepdims=True), v)
    return np.asarray(mixed.reshape(*mixed.shape[:2], -1))


def test_packed_operands() -> None:
    """ONNX Runtime has no kernel for a CPU: against what its documentation says."""
    packed = draw_array(0, 2, 5, 3, 3, 4)
    graph = unfused(fused_graph("MultiHeadAttention", {"q": packed}, num_heads=3))
    (found,) = run_feeds(graph, {"q": packed})
    wanted = by_hand(*(packed[:, :, :, index] for index in range(3)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    query, both = draw_array(1, 2, 6, 12), draw_array(2, 2, 5, 3, 2, 4)
    graph = unfused(fused_graph("MultiHeadAttention", {"q": query, "k": both}, num_heads=3))
    (found,) = run_feeds(graph, {"q": query, "k": both})
    wanted = by_hand(query.reshape(2, 6, 3, 4), both[:, :, :, 0], both[:, :, :, 1])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


X, WEIGHTS = draw_array(0, 2, 5, 6), draw_array(1, 6, 18)


@pytest.mark.parametrize(
    ("changes", "attributes", "reason"),
    [
        ({}, {"unidirectional": 1}, "unidirectional is 1"),
        ({"bias": None, "mask": np.array([[1] * 4 + [0]] * 2, np.int32)}, {}, "it has a mask"),
        ({"bias": None, "mask": np.array([5, 5], np.int32)}, {}, "it has a mask"),
        ({"bias": None, "mask": None, "past": np.zeros((2, 2, 3, 0, 2), np.float32)}, {}, "past"),
    ],
)
def test_attention_that_is_refused(
    changes: dict[str, Array | None], attributes: dict[str, Any], reason: str
) -> None:
    inputs = {"x": X, "weights": WEIGHTS} | changes
    graph = fused_graph("Attention", inputs, ["weights", "mask"], num_heads=3, **attributes)
    with pytest.raises(InputError, match=reason):
        run(UnfuseMicrosoft(), graph)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 0}, "0 heads do not fit the widths"),
        ({"num_heads": 4}, "4 heads do not fit the widths"),
        ({"qkv_hidden_sizes": [6, 6]}, "3 heads do not fit the widths"),
        ({"num_heads": "three"}, "its inputs or attributes are none that it takes"),
    ],
)
def test_malformed_nodes_are_refused(changes: dict[str, Any], reason: str) -> None:
    attributes = {"num_heads": 3} | changes
    graph = fused_graph("Attention", {"x": X, "weights": WEIGHTS}, ["weights"], **attributes)
    with pytest.raises(InputError, match=reason):
        run(UnfuseMicrosoft(), graph)
    (node,) = graph.nodes
    del node.attrs["num_heads"]
    with pytest.raises(InputError, match="its inputs or attributes are none that it takes"):
        run(UnfuseMicrosoft(), graph)


def test_a_mask_that_is_an_input_is_refused() -> None:
    inputs = {"x": X, "weights": WEIGHTS, "bias": None, "mask": np.ones((2, 5), np.int32)}
    graph = fused_graph("Attention", inputs, ["weights"], num_heads=3)
    with pytest.raises(InputError, match="it has a mask that is not 1 everywhere"):
        run(UnfuseMicrosoft(), graph)


def test_keys_that_are_read_elsewhere_are_refused() -> None:
    inputs = {"q": X, "k": X, "v": X}
    outputs = [("y", 3), ("present_key", 4), ("present_value", 4)]
    graph = fused_graph("MultiHeadAttention", inputs, outputs=outputs, num_heads=3)
    with pytest.raises(InputError, match="its output present_key is read"):
        run(UnfuseMicrosoft(), graph)


def test_a_bias_of_packed_operands_is_refused() -> None:
    inputs: dict[str, Array | None] = {
        "q": draw_array(0, 2, 5, 3, 3, 4), "k": None, "v": None, "bias": draw_array(1, 36),
    }  # fmt: skip
    graph = fused_graph("MultiHeadAttention", inputs, ["bias"], num_heads=3)
    with pytest.raises(InputError, match="it has a bias, and its operands are by head already"):
        run(UnfuseMicrosoft(), graph)
