"""Let an encoder compute in FLOAT16 where it is not quantized (ONNX Cast; Q/DQ of opset 19)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regcache.passes import float8
from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.tensorrt_operators import (
    DEQUANTIZE_MXFP8,
    DOMAIN,
    OPERATORS,
    QUANTIZERS,
)
from regcache.passes.walk import SHAPE_OPS, is_constant, producer

LARGEST = float(np.finfo(np.float16).max)
_FLOAT, _HALF = np.dtype(np.float32), np.dtype(np.float16)

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_POWERS = frozenset({"CumSum", "Exp", "Log", "Pow", "Reciprocal", "Sqrt"})
# Ops that hand numbers on or choose among them: where those are FLOAT, FLOAT16 loses for nothing.
_CHOOSE = {"Abs", "GatherElements", "Neg", "ReduceMax", "ReduceMin", "ScatterElements", "TopK"}
_MOVES = SHAPE_OPS - _QDQ - OPERATORS - {"Cast"} | _CHOOSE | {"Concat", "Expand"}
_PRODUCTS = frozenset({"Attention", "Conv", "Gemm", "MatMul"})
# The largest number in a quantized type; what is not here is FP8 or has 4 bits.
_REACH = {np.dtype(np.int8): 128, np.dtype(np.uint8): 255}


@dataclass(frozen=True)
class HalfPrecision:
    """Compute in FLOAT16; inputs and outputs of the graph stay FLOAT, integers as they are.

    For TensorRT's strongly typed networks, as the last pass. Constants are converted, the scales
    of Q/DQ pairs included, and a Cast stands wherever the two types meet.

    Kept in FLOAT: norms, softmax, powers, sums over an axis, and what reads a scalar below
    FLOAT16's normal numbers (an epsilon); what makes or reads a tensor that `ranges` (name ->
    lowest and highest number observed) puts beyond +-65504; Q/DQ pairs whose scale is below
    2 ** -14 or whose integers stand for numbers beyond 65504, with the products that read them and
    all pairs these read; ops that ONNX does not define for FLOAT16; ops that only move numbers
    where those are FLOAT; and with `float_stream` the adds of the residual stream. (On DINOv2-S a
    FLOAT stream takes 1 - cosine from 1.5e-6 to 1.2e-6, and twice the traffic between kernels.)

    Refused with InputError: a finite constant beyond +-65504 that would be converted, opsets below
    19, control flow, a tensor of unknown type, and with `float_stream` a graph without blocks.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    float_stream: bool = False
    name: ClassVar[str] = "half_precision"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """Opset 19, typed tensors, no control flow, no constant that becomes infinite."""
        if graph.opset < 19:
            raise InputError(f"half_precision needs opset 19, the graph has {graph.opset}")
        tensors = graph.tensors()
        unknown = self.ranges.keys() - tensors.keys()
        if unknown:
            raise InputError(f"half_precision: no tensor {min(unknown)!r} in the graph")
        for name, tensor in tensors.items():
            if tensor.dtype is None:
                raise InputError(f"half_precision: the type of {name!r} is not known")
        for node in graph.nodes:
            if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                raise InputError(f"half_precision: {node.op} {_name(node)!r} is control flow")
        for node, slot, half in _float_inputs(graph, self._reasons(graph)):
            if half and is_constant(node.inputs[slot]):
                _check_fits(node, node.inputs[slot])

    def rewrite(self, graph: gs.Graph) -> Log:
        """Retype what nodes make, then insert the Casts and convert the constants they read."""
        reasons = self._reasons(graph)
        inputs = _float_inputs(graph, reasons)
        made = [
            output
            for node in graph.nodes
            if id(node) not in reasons
            for slot, output in enumerate(node.outputs)
            if output.dtype == _FLOAT and _may_be_half(graph, node, slot, output=True)
        ]
        changed = {id(node) for node, _, half in inputs if half}
        changed |= {id(output.inputs[0]) for output in made}
        log = Log(
            tuple(Edit(_name(node), "FLOAT16") for node in graph.nodes if id(node) in changed),
            tuple(
                Skip(_name(node), reasons[id(node)], _slower(node))
                for node in graph.nodes
                if id(node) in reasons
            ),
        )
        for output in made:
            output.dtype = _HALF
            if output.inputs[0].op == DEQUANTIZE_MXFP8:
                output.inputs[0].attrs["output_dtype"] = int(onnx.TensorProto.FLOAT16)
        _cast_outputs(graph, made)
        done: dict[tuple[int, bool], gs.Tensor] = {}
        for node, slot, half in inputs:
            node.inputs[slot] = _retyped(graph, node.inputs[slot], half, done)
        return log

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Only Casts are new, no node is lost, and inputs and outputs are what they were."""
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        assert (new - old).keys() <= {"Cast"}
        assert not old - new
        inputs = zip(before.inputs, after.inputs, strict=True)
        for one, other in (*inputs, *zip(before.outputs, after.outputs, strict=True)):
            assert (one.name, one.dtype) == (other.name, other.dtype)

    def _reasons(self, graph: gs.Graph) -> dict[int, str]:
        """Why nodes that touch FLOAT keep it, by the node's id; the others become FLOAT16."""
        beyond = self._beyond(graph)
        stream = set[str]()
        if self.float_stream:
            for block in view_encoder(graph).blocks:
                stream |= {block.input.name, block.middle.name, block.output.name}
        floats = {tensor.name for tensor in graph.inputs if tensor.dtype == _FLOAT}
        reasons = _float_pairs(graph, beyond)
        for node in graph.nodes:
            if not any(item.dtype == _FLOAT for item in (*node.inputs, *node.outputs)):
                continue
            reason = reasons.get(id(node)) or _op_reason(graph, node) or _range_reason(node, beyond)
            if node.op == "Add" and node.outputs[0].name in stream:
                reason = reason or "on the residual stream"
            if node.op in _MOVES and any(item.name in floats for item in node.inputs):
                reason = reason or "moves FLOAT"
            if reason:
                reasons[id(node)] = reason
            floats |= {
                output.name
                for slot, output in enumerate(node.outputs)
                if reason or not _may_be_half(graph, node, slot, output=True)
            }
        return reasons

    def _beyond(self, graph: gs.Graph) -> set[str]:
        """The tensors beyond FLOAT16 by `ranges`, and what hands their numbers on."""
        found = {name for name, ends in self.ranges.items() if max(map(abs, ends)) > LARGEST}
        for node in graph.nodes:
            if node.op in _MOVES and any(item.name in found for item in node.inputs):
                found |= {item.name for item in node.outputs}
        return found


def _slower(node: gs.Node) -> str | None:
    """What it costs that a node keeps FLOAT: next to nothing but where it multiplies floats."""
    makers = [producer(item) for item in node.inputs]
    integers = all(maker is not None and maker.op in _QDQ for maker in makers)
    return "TensorRT computes it in FP32" if node.op in _PRODUCTS and not integers else None


def _float_pairs(graph: gs.Graph, beyond: set[str]) -> dict[int, str]:
    """Reasons of the Q/DQ pairs that stay FLOAT, and of the products that read them.

    TensorRT wants one type for all scales of a product, so one pair takes the others along.
    """
    reasons = {id(node): _pair_reason(node, beyond) for node in graph.nodes if node.op in _QDQ}
    found = {key: reason for key, reason in reasons.items() if reason}
    groups = []
    for node in graph.nodes:
        pairs = [item for item in map(producer, node.inputs) if item and item.op in _QDQ]
        if node.op != "QuantizeLinear" and pairs:
            groups.append({id(item) for item in (node, *pairs)})
    while True:
        touched = [group for group in groups if group & found.keys() and group - found.keys()]
        if not touched:
            return found
        found |= dict.fromkeys(set().union(*touched) - found.keys(), "multiplies with FLOAT scales")


def _pair_reason(node: gs.Node, beyond: set[str]) -> str | None:
    """What speaks against a FLOAT16 scale of a QuantizeLinear or DequantizeLinear."""
    reads = node.op == "DequantizeLinear"
    integers, floats = (node.inputs[0], node.outputs[0])[:: 1 if reads else -1]
    if floats.name in beyond:
        return f"{floats.name!r} is beyond FLOAT16"
    if not is_constant(node.inputs[1]):
        return None
    scales = np.abs(node.inputs[1].values.astype(np.float64))
    if scales.max(initial=0) * _REACH.get(integers.dtype, float8.LARGEST) > LARGEST:
        return "its integers stand for numbers beyond FLOAT16"
    if scales.min(initial=1) < float8.SMALLEST_SCALE:
        return "its scale is below FLOAT16's normal numbers"
    return None


def _op_reason(graph: gs.Graph, node: gs.Node) -> str | None:
    """What speaks against FLOAT16 in the op itself."""
    if _formals(node.op, node.domain or "", graph.opset) is None:
        return "not an op of ONNX"
    # Powers and sums over an axis leave FLOAT16 long before what comes of them does. TensorRT-RTX
    # fuses norms, and softmax into attention, with the Casts around: FLOAT costs no kernel there.
    sums = node.op.startswith("Reduce") and node.op not in _CHOOSE
    if sums or node.op in _POWERS or node.op.endswith(("Normalization", "Softmax")):
        return "a norm, softmax, power or sum"
    if node.op in {"Cast", "ConstantOfShape"} or "dtype" in node.attrs:
        return "its type is an attribute"
    return None


def _range_reason(node: gs.Node, beyond: set[str]) -> str | None:
    """What speaks against FLOAT16 in the numbers that a node reads and makes."""
    for item in (*node.inputs, *node.outputs):
        if item.name in beyond:
            return f"{item.name!r} is beyond FLOAT16"
        if is_constant(item) and item.dtype == _FLOAT and item.values.size == 1:
            value = float(item.values.reshape(()))
            if 0 < abs(value) < float8.SMALLEST_SCALE:
                return f"reads {value:g}"
    return None


@cache
def _formals(op: str, domain: str, opset: int) -> tuple[tuple[bool, ...], tuple[bool, ...]] | None:
    """Which inputs and outputs of an op may be FLOAT16; None where ONNX and TensorRT have none."""
    if domain == DOMAIN and op in OPERATORS:
        return ((True, True), (False, False)) if op in QUANTIZERS else ((False, False), (True,))
    if domain not in {"", "ai.onnx"} or not onnx.defs.has(op):
        return None
    schema = onnx.defs.get_schema(op, opset, "")
    inputs, outputs = (
        tuple("tensor(float16)" in formal.types for formal in formals)
        for formals in (schema.inputs, schema.outputs)
    )
    return inputs, outputs


def _may_be_half(graph: gs.Graph, node: gs.Node, slot: int, *, output: bool) -> bool:
    formals = _formals(node.op, node.domain or "", graph.opset)
    if formals is None:
        return False
    allowed = formals[output]
    return allowed[min(slot, len(allowed) - 1)]  # the last may stand for any number


def _float_inputs(graph: gs.Graph, reasons: Mapping[int, str]) -> list[tuple[gs.Node, int, bool]]:
    """(node, number of an input that is FLOAT, whether it becomes FLOAT16); Cast reads any type."""
    return [
        (node, slot, id(node) not in reasons and _may_be_half(graph, node, slot, output=False))
        for node in graph.nodes
        if node.op != "Cast"
        for slot, tensor in enumerate(node.inputs)
        if tensor.dtype == _FLOAT
    ]


def _check_fits(node: gs.Node, constant: gs.Constant) -> None:
    finite = constant.values[np.isfinite(constant.values)]
    peak = float(np.abs(finite).max(initial=0))
    if peak > LARGEST:
        raise InputError(
            f"half_precision: {node.op} {_name(node)!r} reads the constant {constant.name!r}, "
            f"which holds {peak:g}, beyond FLOAT16's 65504"
        )


def _cast_outputs(graph: gs.Graph, made: list[gs.Variable]) -> None:
    """Let outputs of the graph that became FLOAT16 be FLOAT, behind a Cast."""
    retyped = {id(item) for item in made}
    for output in [item for item in graph.outputs if id(item) in retyped]:
        inner = gs.Variable(f"{output.name}/float16", dtype=_HALF, shape=output.shape)
        for node in list(output.outputs):
            node.inputs = [inner if item is output else item for item in node.inputs]
        (maker,) = output.inputs
        maker.outputs = [inner if item is output else item for item in maker.outputs]
        output.dtype = _FLOAT
        _append_cast(graph, inner, output)


def _retyped(
    graph: gs.Graph, tensor: gs.Tensor, half: bool, done: dict[tuple[int, bool], gs.Tensor]
) -> gs.Tensor:
    """The tensor in FLOAT16 or FLOAT: itself, a converted constant, or the output of a Cast."""
    wanted = _HALF if half else _FLOAT
    if tensor.dtype == wanted:
        return tensor
    key = (id(tensor), half)
    if key not in done:
        name = f"{tensor.name}/{wanted.name}"
        if is_constant(tensor):
            done[key] = gs.Constant(name, tensor.values.astype(wanted))
        else:
            done[key] = gs.Variable(name, dtype=wanted, shape=tensor.shape)
            _append_cast(graph, tensor, done[key])
    return done[key]


def _append_cast(graph: gs.Graph, source: gs.Tensor, target: gs.Tensor) -> None:
    to = onnx.helper.np_dtype_to_tensor_dtype(target.dtype)
    graph.nodes.append(gs.Node("Cast", f"{target.name}/cast", {"to": int(to)}, [source], [target]))


def _name(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)
