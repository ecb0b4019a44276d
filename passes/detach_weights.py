"""Take the weights out of a graph and put them back, so that its structure fits into a message."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, update_import_domains

from regcache.passes.copy_graph import copy_graph
from regcache.passes.external_weights import kept_at
from regcache.passes.walk import tensors_of
from regcache.passes.write_message import is_plain, write_node, write_plain

# Shape arithmetic lives in tiny constants; anything larger is a weight whose values do not matter.
LARGEST_KEPT = 1024
# ONNX Runtime's reader of shapes wants to find theirs in the message.
_LARGEST_IN_MESSAGE = 256

Weights = dict[str, NDArray[Any]]


def detach_weights(graph: gs.Graph, largest_kept: int = LARGEST_KEPT) -> tuple[gs.Graph, Weights]:
    """A copy whose constants of more than `largest_kept` numbers are graph inputs, and those."""
    bare = copy_graph(graph)
    weights: Weights = {}
    for name, tensor in tensors_of(bare).items():
        if isinstance(tensor, gs.Constant) and _size(tensor) > largest_kept:
            stand_in = gs.Variable(name, dtype=tensor.dtype, shape=tensor.shape)
            _exchange(tensor, stand_in)
            bare.inputs.append(stand_in)
            weights[name] = tensor.values
    return bare, weights


def pack_graph(graph: gs.Graph) -> tuple[bytes, Weights]:
    """A graph as ONNX bytes of a few hundred kilobytes, and its weights (see unpack_graph)."""
    bare, weights = detach_weights(graph)
    return gs.export_onnx(bare, do_type_check=False).SerializeToString(), weights


def unpack_graph(model: bytes, weights: Weights) -> gs.Graph:
    """The graph that pack_graph took apart; it shares the weight arrays."""
    graph = gs.import_onnx(onnx.load_from_string(model))
    attach_weights(graph, weights)
    return graph


class _Frame(gs.Graph):  # type: ignore[misc]
    """Another graph, to be written without its nodes, and with those constants alone."""

    def __init__(self, graph: gs.Graph, constants: dict[str, gs.Constant]) -> None:
        self.__dict__.update(graph.__dict__)
        self.nodes: list[gs.Node] = []
        self._constants = constants

    def tensors(self, check_duplicates: bool = False) -> dict[str, gs.Tensor]:
        return dict(self._constants)


def export_skeleton(
    graph: gs.Graph, largest_kept: int = LARGEST_KEPT
) -> tuple[onnx.ModelProto, dict[str, gs.Constant]]:
    """A graph's message without constants of more than `largest_kept` numbers, and these, by name.

    Nor does it hold types and shapes of inner tensors. The graph is not copied: a sixth of the time
    of detach_weights and an export.
    """
    constants = {
        name: item for name, item in tensors_of(graph).items() if isinstance(item, gs.Constant)
    }
    kept = {name: item for name, item in constants.items() if _size(item) <= largest_kept}
    odd = {name: item for name, item in kept.items() if not is_plain(item)}
    opsets = update_import_domains(graph)
    model = gs.export_onnx(_Frame(graph, odd), do_type_check=False, opset_imports=opsets)
    for node in graph.nodes:
        write_node(node, model.graph.node.add())
    for name, item in kept.items():
        if name not in odd:
            write_plain(item, model.graph.initializer.add())
    return model, {name: item for name, item in constants.items() if name not in kept}


@dataclass(frozen=True)
class Lent:
    """A graph as ONNX bytes whose large initializers lie elsewhere.

    `weights`: these, by name, the graph's own arrays. Those that `in_files` names lie in files in
    `folder` (see keep_weights), and the bytes say where, to who runs them as a file in that folder;
    the others are to be lent.
    """

    content: bytes
    weights: Weights
    folder: Path | None = None
    in_files: frozenset[str] = frozenset()


def lend_weights(graph: gs.Graph) -> Lent:
    """A graph to be run, whose weights are shared.

    An array of a type that NumPy itself does not have stays in the bytes.
    """
    model, left_out = export_skeleton(graph, _LARGEST_IN_MESSAGE)
    lent: Weights = {}
    in_files, folder = set[str](), None
    for name, constant in left_out.items():
        values = constant.values
        if values.dtype.kind not in "fiu":
            model.graph.initializer.append(OnnxExporter.export_tensor_proto(constant))
            continue
        lent[name] = values
        stored = model.graph.initializer.add(
            name=name,
            dims=values.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        place = kept_at(values)
        if place is None or folder not in {None, place[0].parent}:
            stored.external_data.add(key="location", value="lent")
            continue
        file, offset = place
        folder = file.parent
        in_files.add(name)
        for key, value in (("location", file.name), ("offset", offset), ("length", values.nbytes)):
            stored.external_data.add(key=key, value=str(value))
    return Lent(model.SerializeToString(), lent, folder, frozenset(in_files))


def attach_weights(graph: gs.Graph, weights: Weights) -> None:
    """Put constants in the place of the graph inputs that stand for weights; arrays are shared."""
    for tensor in list(graph.inputs):
        if tensor.name in weights:
            _exchange(tensor, gs.Constant(tensor.name, weights[tensor.name]))
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in weights]


def _exchange(old: gs.Tensor, new: gs.Tensor) -> None:
    for node in list(old.outputs):
        node.inputs = [new if item is old else item for item in node.inputs]


def _size(tensor: gs.Constant) -> int:
    size = 1
    for dim in tensor.shape:
        size *= dim
    return size
