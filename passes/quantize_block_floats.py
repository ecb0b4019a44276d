"""Put block-scaled floats around the linears of a vision encoder: NVFP4 and MXFP8 of TensorRT."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.block_floats import (
    EXPONENTS,
    BlockFloat,
    BlockFloatWeight,
    BlockFormat,
    round_weight,
)
from regcache.passes.encoder import EncoderView, Site
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float4 import packed
from regcache.passes.float8 import FLOAT8
from regcache.passes.qdq_nodes import check_names, check_planned, free_name, plan_sites
from regcache.passes.tensorrt_operators import (
    DEQUANTIZE_MXFP8,
    DOMAIN,
    QUANTIZE_FP4,
    QUANTIZE_MXFP8,
    import_tensorrt,
)
from regcache.passes.walk import stored_weight

# The first with 4-bit floats.
_OPSET, _IR_VERSION = 23, 11


@dataclass(frozen=True)
class QuantizeBlockFloats:
    """Quantize the blocks' linears to floats that share a scale in blocks of input channels.

    Activations are scaled as the engine runs, by TensorRT's own operators (domain trt), which
    ExpandBlockFloats writes for ONNX Runtime. `weights`, by the linear's name, are stored as they
    are, all others rounded to the nearest. Sites and `only` are as in QuantizeLinears; a site whose
    channels fill no whole blocks stays float. The graph comes out in opset 23.

    TensorRT-RTX 1.7 multiplies in FP4 with the result of NVFP4, for compute capability 12.0 and
    12.1. It parses MXFP8 too, but dequantizes both operands and multiplies in FP16.
    """

    activations: Mapping[str, BlockFloat]
    only: frozenset[str] | None = None
    weights: Mapping[str, BlockFloatWeight] = field(default_factory=dict)
    name: ClassVar[str] = "quantize_block_floats"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder that opset 23 reads alike, scales and names of its tensors."""
        if graph.opset < 21 and any(node.op == "GroupNormalization" for node in graph.nodes):
            raise InputError("quantize_block_floats: opset 23 has another GroupNormalization")
        names = self.weights.keys() | (self.only or frozenset())
        known = check_names(self.name, graph, self.activations, names)
        for name, weight in self.weights.items():
            if weight.values.shape != known[name].weight_shape:
                raise InputError(f"quantize_block_floats: the weight of {name} has another shape")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the operators and replace the weights."""
        sites, skips = self._plan(view_encoder(graph))
        stored: dict[str, gs.Variable] = {}
        taken = frozenset(graph.tensors())
        for site in sites:
            scale = self.activations[site.tensor.name]
            floats = _activation(graph, site, free_name(site.tensor.name, taken), scale)
            for linear in site.linears:
                constant = stored_weight(linear.matmul)
                assert constant is not None
                if constant.name not in stored:
                    weight = self.weights.get(linear.name)
                    if weight is None:
                        weight = round_weight(constant.values, scale.kind)
                    stored[constant.name] = _weight(graph, free_name(constant.name, taken), weight)
                linear.matmul.inputs = [floats, stored[constant.name]]
        if sites:
            import_tensorrt(graph, _OPSET, _IR_VERSION)
        edits = [
            Edit(site.name, f"{self.activations[site.tensor.name].kind.value} by blocks")
            for site in sites
        ]
        return Log(tuple(edits), skips)

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears in the same places, quantized exactly where planned."""
        old, new = view_encoder(before), view_encoder(after)
        check_planned(old, new, self._plan(old)[0])

    def _plan(self, view: EncoderView) -> tuple[list[Site], tuple[Skip, ...]]:
        sites, skips = plan_sites(view, self.activations, self.only)
        whole, broken = list[Site](), list[Skip]()
        for site in sites:
            size = self.activations[site.tensor.name].kind.block_size
            channels = site.linears[0].weight_shape[0]
            if channels % size:
                reason = f"{channels} channels fill no whole blocks of {size}"
                broken.append(Skip(site.name, reason, "TensorRT computes it in float"))
            else:
                whole.append(site)
        return whole, (*skips, *broken)


def _activation(graph: gs.Graph, site: Site, name: str, scale: BlockFloat) -> gs.Variable:
    """The float32 output of new operators that round an activation in blocks along its channels."""
    size, tensor = scale.kind.block_size, site.tensor
    shape = None if tensor.shape is None else list(tensor.shape)
    count = None if shape is None else [*shape[:-1], site.linears[0].weight_shape[0] // size]
    nvfp4 = scale.kind is BlockFormat.NVFP4
    numbers = gs.Variable(f"{name}/quantized", scale.kind.dtype, shape)
    scales = gs.Variable(f"{name}/scales", FLOAT8 if nvfp4 else EXPONENTS, count)
    attributes = {"axis": -1, "block_size": size}
    if not nvfp4:
        typed = {"output_dtype": int(onnx.TensorProto.FLOAT8E4M3FN)}
        quantize = gs.Node(
            QUANTIZE_MXFP8, f"{name}/q", attributes | typed, [tensor], [numbers, scales]
        )
        quantize.domain = DOMAIN
        graph.nodes.append(quantize)
        return _mxfp8(graph, name, [numbers, scales], attributes, shape)
    whole = gs.Constant(f"{name}/scale", np.array(scale.scale, np.float32))
    typed = {"scale_type": int(onnx.TensorProto.FLOAT8E4M3FN)}
    quantize = gs.Node(
        QUANTIZE_FP4, f"{name}/q", attributes | typed, [tensor, whole], [numbers, scales]
    )
    quantize.domain = DOMAIN
    graph.nodes.append(quantize)
    return _dequantized(graph, name, (numbers, scales, whole), attributes)


def _weight(graph: gs.Graph, name: str, weight: BlockFloatWeight) -> gs.Variable:
    """The float32 output of new operators that dequantize a stored weight [K, N]."""
    kind = weight.kind
    attributes = {"axis": 0, "block_size": kind.block_size}
    numbers = gs.Constant(f"{name}/quantized", packed(weight.values.astype(kind.dtype)))
    if kind is BlockFormat.MXFP8:
        # TensorRT's parser reads no initializer of E8M0: its bytes are told as uint8.
        exponents = weight.scales.astype(EXPONENTS).view(np.uint8)
        inputs = [numbers, gs.Constant(f"{name}/scales", exponents)]
        return _mxfp8(graph, name, inputs, attributes, list(weight.values.shape))
    scales = gs.Constant(f"{name}/scales", weight.scales.astype(FLOAT8))
    whole = gs.Constant(f"{name}/scale", np.array(weight.scale, np.float32))
    return _dequantized(graph, name, (numbers, scales, whole), attributes)


def _dequantized(
    graph: gs.Graph,
    name: str,
    parts: tuple[gs.Tensor, gs.Tensor, gs.Tensor],
    attributes: dict[str, int],
) -> gs.Variable:
    """Numbers times the scales of their blocks times that of the tensor, in ONNX's operators."""
    numbers, scales, whole = parts
    steps, floats = (gs.Variable(f"{name}/{what}", np.float32) for what in ("steps", "dequantized"))
    graph.nodes += [
        gs.Node("DequantizeLinear", f"{name}/steps/dq", {}, [scales, whole], [steps]),
        gs.Node("DequantizeLinear", f"{name}/dq", attributes, [numbers, steps], [floats]),
    ]
    return floats


def _mxfp8(
    graph: gs.Graph,
    name: str,
    inputs: list[gs.Tensor],
    attributes: dict[str, int],
    shape: list[int | str] | list[int] | None,
) -> gs.Variable:
    floats = gs.Variable(f"{name}/dequantized", np.float32, shape)
    typed: dict[str, Any] = {"output_dtype": int(onnx.TensorProto.FLOAT)}
    node = gs.Node(DEQUANTIZE_MXFP8, f"{name}/dq", attributes | typed, inputs, [floats])
    node.domain = DOMAIN
    graph.nodes.append(node)
    return floats
