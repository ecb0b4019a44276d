"""Read an ONNX file of any size, opset and exporter as a graph of standard operators.

onnx's own tools serialise a whole model, which protobuf does for 2 GB at most. So weights are taken
out first and put back into the graph: mapped from their file where they lie in one.
"""

from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from regcache.passes.check import ONNX_ERRORS
from regcache.passes.check_structure import check_structure, refuse_references
from regcache.passes.detach_weights import attach_weights
from regcache.passes.errors import InputError, first_line
from regcache.passes.message_graphs import all_nodes, texts_are_valid
from regcache.passes.message_weights import take_weights
from regcache.passes.quiet import quiet
from regcache.passes.raise_opset import raise_opset
from regcache.passes.sort_nodes import sort_nodes

_NO_NUMBERS = {"value_ints": onnx.TensorProto.INT64, "value_floats": onnx.TensorProto.FLOAT}
_LISTS = (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS)


def read_graph(path: Path) -> gs.Graph:
    """Read an ONNX file with its external data: sorted, functions inlined, opset 20 or later.

    Raises InputError, naming the file and the reason, when it is missing, truncated or not ONNX;
    when it is quantized already; when external data is missing, too short or outside the file's
    folder; when check_structure refuses it; when a weight holds NaN or infinity; or when the opset
    cannot be raised.
    """
    model = read_message(path)
    refuse_quantized(model, path)
    try:
        check_structure(model)
        sort_nodes(model.graph)
        weights = take_weights(model, path)
        if model.functions:
            model = _inline_functions(model)
            weights |= take_weights(model, path)  # those inside the functions
        # Whatever refers to a part of a message keeps all memory that the message ever took.
        model = onnx.ModelProto.FromString(model.SerializeToString())
        graph = _import(raise_opset(model))
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: {reason}") from error
    attach_weights(graph, weights)
    return graph


def read_message(path: Path) -> onnx.ModelProto:
    """The message of an ONNX file, external data left where it is.

    Raises InputError when the file is missing, truncated or not ONNX.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX file, or truncated") from error
    if not model.opset_import or not model.graph.node:
        raise InputError(f"{path}: not an ONNX file, or truncated (no graph in it)")
    if not texts_are_valid(model):
        raise InputError(f"{path}: not an ONNX file, or damaged (a name in it is no text)")
    return model


_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits")


def refuse_quantized(model: onnx.ModelProto, path: Path) -> None:
    """Raise InputError, naming the first, where the model holds quantized operators."""
    functions = (node for function in model.functions for node in function.node)
    for node in (*all_nodes(model.graph), *functions):
        op = node.op_type
        if op in _QUANTIZED or op.startswith(("QLinear", "QAttention", "QGemm", "DynamicQuantize")):
            raise InputError(
                f"{path}: quantized already ({op} {node.name!r}); bring the float file of it"
            )


def _inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace calls of the model's own functions by what is in them."""
    from onnx import inliner  # onnx imports it on demand only

    try:
        # Functions of another opset than the model's are converted, which takes shapes.
        typed = onnx.shape_inference.infer_shapes(model)
        inlined: onnx.ModelProto = inliner.inline_local_functions(typed, convert_version=True)
    except ONNX_ERRORS as error:
        raise InputError(f"its functions cannot be inlined: {first_line(error)}") from error
    return inlined


def _settle_empty_lists(graph: onnx.GraphProto) -> None:
    """Give what a Constant of no numbers is as a tensor.

    Raises InputError for any other attribute that is an empty list: onnx-graphsurgeon forgets of
    what.
    """
    for node in all_nodes(graph):
        for item in node.attribute:
            if item.type not in _LISTS or item.ints or item.floats or item.strings:
                continue
            if node.op_type != "Constant" or item.name not in _NO_NUMBERS:
                where = f"{node.op_type} {node.name or list(node.output)!r}"
                raise InputError(f"attribute {item.name!r} of {where} is an empty list")
            empty = onnx.helper.make_tensor("", _NO_NUMBERS[item.name], [0], [])
            item.CopyFrom(onnx.helper.make_attribute("value", empty))


def _import(model: onnx.ModelProto) -> gs.Graph:
    """The message as a graph; raises InputError where onnx-graphsurgeon cannot read it."""
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise InputError(f"weight {name!r} is stored as a sparse tensor")
    refuse_references(model.graph)  # those of functions whose calls leave one out
    _settle_empty_lists(model.graph)
    try:
        with quiet():
            return gs.import_onnx(model)
    except UnicodeDecodeError as error:
        raise InputError(f"an attribute in it is no text: {first_line(error)}") from error
