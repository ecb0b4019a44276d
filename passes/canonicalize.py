"""Bring any exporter's graph into the form that the encoder view and the other passes read."""

import onnx
import onnx_graphsurgeon as gs

from regcache.passes.base import Pass, PassRun, run_all
from regcache.passes.check import check_and_infer
from regcache.passes.drop_masks import DropMasks
from regcache.passes.errors import InputError, first_line
from regcache.passes.fold_constants import FoldConstants
from regcache.passes.free_tokens import FreeTokens
from regcache.passes.fuse_gelu import FuseGelu
from regcache.passes.fuse_layer_norm import FuseLayerNorm
from regcache.passes.fuse_rms_norm import FuseRmsNorm
from regcache.passes.fuse_softmax import FuseSoftmax
from regcache.passes.lower_einsum import LowerEinsum
from regcache.passes.merge_transposes import MergeTransposes
from regcache.passes.onnx_file import import_graph
from regcache.passes.raise_opset import raise_opset
from regcache.passes.resolve_shapes import ResolveShapes
from regcache.passes.split_gemm import SplitGemm

PASSES: tuple[Pass, ...] = (
    FoldConstants(),
    ResolveShapes(),
    FoldConstants(),
    LowerEinsum(),
    FuseLayerNorm(),
    FuseRmsNorm(),
    FuseGelu(),
    FuseSoftmax(),
    SplitGemm(),
    DropMasks(),
    MergeTransposes(),
    FreeTokens(),
)


def canonicalize(model: onnx.ModelProto) -> gs.Graph:
    """Upgrade to opset 20 or later, fold constants, recognise LayerNormalization and Gelu.

    Returns a graph with shapes on its tensors that computes what `model` does within float
    rounding. Raises InputError when the opset cannot be upgraded or shapes do not fit together.
    """
    return canonicalize_graph(import_graph(raise_opset(model)))


def canonicalize_graph(graph: gs.Graph) -> gs.Graph:
    """As `canonicalize`, for a graph of opset 20 or later."""
    return canonicalize_logged(graph)[0]


def canonicalize_logged(graph: gs.Graph) -> tuple[gs.Graph, list[PassRun]]:
    """As canonicalize_graph; also returns the logs of passes that edited or refused something."""
    try:
        check_and_infer(graph)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise InputError(f"the graph's shapes do not fit: {first_line(error)}") from error
    return run_all(PASSES, graph)
