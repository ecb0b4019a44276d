"""Turn a half precision graph into one of FP32: its weights, casts and inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.walk import is_constant, replace_everywhere

_FLOAT = onnx.TensorProto.FLOAT
_OTHER_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_TYPE_ATTRIBUTES = frozenset(["to", "dtype", "stash_type", "softmax_precision"])
# In GELU, its tanh and its sigmoid approximation.
_GELU_CONSTANTS = (2**0.5, 0.5**0.5, (2 / np.pi) ** 0.5, 0.044715, 1.702)


@dataclass(frozen=True)
class ToFloat32:
    """Compute in FP32 what a graph computes in FP16, BF16 or FP64.

    Rewritten: constants, the types that Cast and other nodes name, inputs and outputs, all of that
    in subgraphs too. A weight is the FP32 number nearest to the stored one; a scalar that is a
    rounded constant of GELU becomes that constant, so that GELU is recognised. Integers and
    booleans stay. Nothing is refused.
    """

    name: ClassVar[str] = "to_float32"
    parity: ClassVar[Parity] = Close(rtol=5e-3, atol=5e-3)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph of FP32 is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Exchange constants and attributes in place; the arrays are copies."""
        edits = [Edit(name, "to float32") for name in _convert(graph)]
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """No constant is of another floating type, and no node is new."""
        assert not any(
            is_constant(tensor) and _other(tensor.dtype) for tensor in after.tensors().values()
        )
        assert len(after.nodes) <= len(before.nodes)  # unused ones go


def _convert(graph: gs.Graph) -> Iterator[str]:
    for tensor in list(graph.tensors().values()):
        if is_constant(tensor) and _other(tensor.values.dtype):
            replace_everywhere(graph, tensor, gs.Constant(tensor.name, _single(tensor.values)))
            yield tensor.name
        elif isinstance(tensor, gs.Variable) and _other(tensor.dtype):
            tensor.dtype = np.dtype(np.float32)
            yield tensor.name
    for node in graph.nodes:
        for key, value in list(node.attrs.items()):
            if isinstance(value, gs.Graph):
                yield from _convert(value)
            elif key in _TYPE_ATTRIBUTES and type_number(value) in _OTHER_FLOATS:
                node.attrs[key] = _FLOAT
                yield node.name or node.op
            elif isinstance(value, gs.Constant) and _other(value.values.dtype):
                node.attrs[key] = gs.Constant(value.name, _single(value.values))
                yield node.name or node.op


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    """The nearest FP32 numbers; for a rounded constant of GELU, that constant itself."""
    if values.size == 1:
        for known in _GELU_CONSTANTS:
            if (values == np.asarray(known).astype(values.dtype)).all():
                return np.full(values.shape, known, np.float32)
    with np.errstate(over="ignore"):  # an overflow of FP64 becomes what FP32 has for it
        return np.asarray(values, np.float32)


def type_number(value: Any) -> int:
    """ONNX's number of a type that graphsurgeon may hold as a numpy type; 0 where it has none."""
    if value is None:  # numpy would take it for float64
        return 0
    if isinstance(value, int):
        return value
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value)))
    except (KeyError, TypeError, ValueError):
        return 0


def _other(dtype: Any) -> bool:
    return type_number(dtype) in _OTHER_FLOATS
