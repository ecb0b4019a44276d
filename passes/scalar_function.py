"""Recognise an activation function by what it computes, however an exporter spelled it."""

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.walk import SHAPE_OPS, is_constant, producer

Floats = NDArray[np.float64]

_erf_of_one = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Floats) -> Floats:
    return np.asarray(_erf_of_one(x), np.float64)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


def _gelu_tanh(x: Floats) -> Floats:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


# The activations of ViT feed-forward layers, by their usual names.
ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: np.asarray(x * _sigmoid(1.702 * x)),
    "silu": lambda x: np.asarray(x * _sigmoid(x)),
    "relu": lambda x: np.asarray(np.maximum(x, 0)),
}


def _clip(x: Floats, low: Floats | None = None, high: Floats | None = None) -> Floats:
    above = x if low is None else np.maximum(x, low)
    return above if high is None else np.minimum(above, high)


_OPS: dict[str, Callable[..., Floats]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Max": np.maximum,
    "Clip": _clip,
    "Exp": np.exp,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Erf": _erf,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "Relu": ACTIVATIONS["relu"],
}
# Ops that keep some elements only; what they leave out would go unseen.
_PICKING_OPS = frozenset({"Split", "Slice", "Gather"})
_SAME_NUMBERS = SHAPE_OPS - _PICKING_OPS | {"Expand"}
# Away from 0, where all activations agree, and as far out as a clip may stand: ReLU6 is no ReLU.
_PROBES = np.array([-90.0, -6.0, -3.1, -1.7, -0.9, -0.4, 0.3, 0.8, 1.6, 2.9, 5.5, 90.0])
_WANTED = {name: function(_PROBES) for name, function in ACTIVATIONS.items()}


def identify_activation(start: gs.Tensor, end: gs.Tensor) -> str | None:
    """Name of the activation that `end` is of `start`, or None when it is none of ACTIVATIONS.

    Evaluates the elementwise nodes between the two on probe values in float64; every path from
    `end` upstream has to reach `start` or a scalar constant.
    """
    result = evaluate(start, end, _PROBES)
    if result is None:
        return None
    for name, wanted in _WANTED.items():
        # np.allclose, a tenth of all the time that reading an encoder takes
        if bool((np.abs(result - wanted) <= 1e-5 + 1e-4 * np.abs(wanted)).all()):
            return name
    return None


def evaluate(start: gs.Tensor, end: gs.Tensor, probes: Floats) -> Floats | None:
    """What `end` is where `start` is `probes`; None where it is no elementwise function of it."""
    try:
        return _evaluate(end, {id(start): probes}, depth=0)
    except _NotElementwiseError:
        return None


class _NotElementwiseError(Exception):
    """The region holds something else than elementwise ops on one input."""


def _evaluate(tensor: gs.Tensor, values: dict[int, Floats], depth: int) -> Floats:
    if id(tensor) in values:
        return values[id(tensor)]
    if is_constant(tensor):
        if tensor.values.size != 1:
            raise _NotElementwiseError
        return np.asarray(tensor.values, dtype=np.float64).reshape(())
    node = producer(tensor)
    if node is None or depth > 16:
        raise _NotElementwiseError
    if node.op in _SAME_NUMBERS:
        return _evaluate(node.inputs[0], values, depth + 1)
    if node.op == "Gelu":
        kind = "gelu_tanh" if node.attrs.get("approximate", "none") == "tanh" else "gelu"
        operation: Callable[..., Floats] = ACTIVATIONS[kind]
    elif node.op in _OPS:
        operation = _OPS[node.op]
    else:
        raise _NotElementwiseError
    arguments = [
        None if item.is_empty() else _evaluate(item, values, depth + 1) for item in node.inputs
    ]
    values[id(tensor)] = np.asarray(operation(*arguments), dtype=np.float64)
    return values[id(tensor)]
