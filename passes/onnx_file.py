"""Read an ONNX file that may be broken or hostile, and write one that is neither."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError

from regcache.passes.errors import InputError, first_line
from regcache.passes.model_files import data_file

# protobuf's limit is 2 GiB; leave room for the nodes.
LARGEST_SINGLE_FILE = 2_000_000_000


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises InputError, naming the file and the reason, when it is missing, truncated or not ONNX;
    when external data is missing, too short or outside the file's folder; when onnx's checker
    refuses the graph; when a float weight holds NaN or infinity; or when it is quantized already.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX file, or truncated") from error
    if not model.opset_import or not model.graph.node:
        raise InputError(f"{path}: not an ONNX file, or truncated (no graph in it)")
    _check_external_data(model, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path}: external data: {first_line(error)}") from error
    _check_graph(model, path)
    return model


def load_graph(path: Path) -> gs.Graph:
    """Read an ONNX file (see load_model) as a graph that owns its weights."""
    return import_graph(load_model(path))


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Turn a model into a graph whose weights are loaded once, so that copies share them."""
    graph = gs.import_onnx(model)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = np.asarray(tensor.values)
    return graph


def save_graph(graph: gs.Graph, path: Path) -> None:
    """Write a graph as ONNX, weights in `NAME.onnx.data` beside it when they pass 2 GB.

    Raises InputError when the file cannot be written, onnx's ValidationError when the graph is not
    valid. The file is checked after writing; callers rename it into place.
    """
    save_model(gs.export_onnx(graph), path)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as ONNX; see save_graph."""
    external = weight_bytes(model) > LARGEST_SINGLE_FILE
    try:
        onnx.save(
            model,
            path,
            save_as_external_data=external,
            location=data_file(path).name if external else None,
        )
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except EncodeError as error:
        raise InputError(f"{path}: the graph is too large for one ONNX file") from error
    onnx.checker.check_model(os.fspath(path))


def weight_bytes(model: onnx.ModelProto) -> int:
    """Size of all initializers in bytes, data that is still external included."""
    return sum(
        int(np.prod(weight.dims, dtype=np.int64))
        * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        for weight in model.graph.initializer
    )


def _external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.t.data_location == onnx.TensorProto.EXTERNAL:
                yield attribute.t


def _check_external_data(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in _external_tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{path}: external data of {tensor.name!r}"
        parts = PurePosixPath(location.replace("\\", "/"))
        target = (folder / location).resolve()
        if not location or parts.is_absolute() or not target.is_relative_to(folder):
            raise InputError(f"{where} points outside the model's folder: {location!r}")
        if not target.is_file():
            raise InputError(f"{where} is missing: {location!r}")
        try:
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        except ValueError as error:
            raise InputError(f"{where} has an offset or length that is no number") from error
        if end > target.stat().st_size:
            raise InputError(f"{where} is truncated: {location!r}")


def _check_graph(model: onnx.ModelProto, path: Path) -> None:
    try:
        if weight_bytes(model) < LARGEST_SINGLE_FILE:
            onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a valid ONNX graph: {first_line(error)}") from error
    quantized = {"QuantizeLinear", "DequantizeLinear", "QLinearMatMul", "MatMulInteger"}
    for node in model.graph.node:
        if node.op_type in quantized:
            raise InputError(f"{path}: quantized already ({node.op_type} {node.name!r})")
    for weight in model.graph.initializer:
        _check_finite(weight, path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                _check_finite(attribute.t, path, name=node.output[0])


def _check_finite(weight: onnx.TensorProto, path: Path, name: str = "") -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    if not np.issubdtype(dtype, np.floating):
        return
    values = onnx.numpy_helper.to_array(weight)
    # A mask constant may hold -inf on purpose; a weight matrix or vector may not.
    bad = np.isnan(values).any() or (values.size > 1 and np.isposinf(values).any())
    if bad:
        raise InputError(f"{path}: weight {name or weight.name!r} holds NaN or infinity")
