"""Write ONNX Runtime's own operators (domain com.microsoft) as ONNX's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from regcache.passes import unfuse_activations as activations
from regcache.passes import unfuse_attention as attention
from regcache.passes import unfuse_norms as norms
from regcache.passes import unfuse_products as products
from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.microsoft import DOMAIN
from regcache.passes.unfused import CannotUnfuseError
from regcache.passes.walk import name_of
from regcache.passes.write_nodes import NodeWriter

_STANDARD = frozenset({None, "", "ai.onnx"})
_HANDLED: dict[str, Callable[[NodeWriter, gs.Node], None]] = {
    "Attention": attention.unfuse_attention,
    "BiasAdd": activations.unfuse_bias_add,
    "BiasGelu": activations.unfuse_bias_gelu,
    "BiasSplitGelu": activations.unfuse_bias_split_gelu,
    "FastGelu": activations.unfuse_fast_gelu,
    "FusedConv": products.unfuse_conv,
    "FusedGemm": products.unfuse_gemm,
    "FusedMatMul": products.unfuse_matmul,
    "Gelu": activations.unfuse_gelu,
    "GemmFastGelu": products.unfuse_gemm_fast_gelu,
    "MatMulIntegerToFloat": products.unfuse_integer_matmul,
    "MultiHeadAttention": attention.unfuse_multi_head_attention,
    "NhwcConv": products.unfuse_nhwc_conv,
    "QuickGelu": activations.unfuse_quick_gelu,
    "SkipLayerNormalization": norms.unfuse_skip_layer_norm,
    "SkipSimplifiedLayerNormalization": norms.unfuse_skip_simplified_layer_norm,
    "TransposeMatMul": products.unfuse_matmul,
}
# An operator of ONNX Runtime alone that it keeps among ONNX's own.
_SIMPLIFIED = "SimplifiedLayerNormalization"
# No schema of onnx has looked at these nodes: whatever is missing or wrong shows when it is read.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class UnfuseMicrosoft:
    """Replace the operators that ONNX Runtime's optimisers fuse, in the numbers they compute.

    Works without inferred shapes, which stop at the first operator of another domain: sizes come
    from attributes and weights. What a mask or a norm's second output would add is refused where
    it matters. Refused with InputError: an operator of another domain that is none of those, and a
    form of one that has no equal. Domains that nothing is left of are forgotten.
    """

    name: ClassVar[str] = "unfuse_microsoft"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 20, which has Gelu and LayerNormalization; no operator that is not known here."""
        fused = [node for node in graph.nodes if _is_foreign(graph, node)]
        inside = [node for part in graph.subgraphs(recursive=True) for node in part.nodes]
        for node in fused:
            if _handler(node) is None:
                raise _cannot(node)
        for node in inside:
            if _is_foreign(graph, node):
                raise _cannot(node, "it stands in a branch or a loop")
        if fused and graph.opset < 20:
            raise InputError(f"unfuse_microsoft needs opset 20, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Write the operators that take a fused one's place; it falls to the clean-up."""
        edits: list[Edit] = []
        if not any(_is_foreign(graph, node) for node in graph.nodes):
            return Log()
        # From the inputs on: what one is written as tells the next one its sizes.
        graph.toposort()
        for node in [node for node in graph.nodes if _is_foreign(graph, node)]:
            unfuse, site = _handler(node), name_of(node)
            assert unfuse is not None
            try:
                unfuse(NodeWriter(graph, f"{node.outputs[0].name}/{node.op}"), node)
            except CannotUnfuseError as error:
                raise _cannot(node, str(error)) from error
            except _MALFORMED as error:
                reason = "its inputs or attributes are none that it takes"
                raise _cannot(node, reason) from error
            node.outputs.clear()
            edits.append(Edit(site, f"{node.op} unfused"))
        if edits:
            graph.import_domains = [onnx.helper.make_opsetid("", graph.opset)]
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Every operator is ONNX's own."""
        assert not any(_is_foreign(after, node) for node in after.nodes)


def _is_foreign(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether a node is no operator of ONNX and no function of the model."""
    if node.domain in _STANDARD:
        return bool(node.op == _SIMPLIFIED)
    return not any((item.domain, item.name) == (node.domain, node.op) for item in graph.functions)


def _handler(node: gs.Node) -> Callable[[NodeWriter, gs.Node], None] | None:
    if node.op == _SIMPLIFIED:
        return norms.unfuse_simplified_layer_norm
    return _HANDLED.get(node.op) if node.domain == DOMAIN else None


def _cannot(node: gs.Node, reason: str = "") -> InputError:
    why = f" ({reason})" if reason else ""
    if node.domain not in {DOMAIN, *_STANDARD}:
        return InputError(
            f"{node.domain} {node.op} {name_of(node)!r} is no operator of ONNX{why}: export it "
            "with ONNX's own operators"
        )
    return InputError(
        f"{node.domain or DOMAIN} {node.op} {name_of(node)!r} cannot be unfused{why}: export "
        "without ONNX Runtime's transformer optimiser, or bring the file as it was before"
    )
