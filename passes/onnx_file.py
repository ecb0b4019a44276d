"""Read an ONNX file that may be broken or hostile, and write one that is neither."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import EncodeError
from numpy.typing import NDArray

from regcache.passes.check_structure import check_structure
from regcache.passes.detach_weights import detach_weights
from regcache.passes.errors import InputError, first_line
from regcache.passes.external_weights import (
    is_external,
    let_go,
    read_external,
    stored_tensors,
)
from regcache.passes.float4 import PackedFloat4, packed
from regcache.passes.model_files import check_free, data_file
from regcache.passes.read_graph import read_message, refuse_quantized
from regcache.passes.stored_tensors import check_finite, read_tensor

# protobuf's limit is 2 GiB; leave room for the nodes.
LARGEST_SINGLE_FILE = 2_000_000_000
_PAGE = 4096
# What lies in the file itself however large the model is: onnx's reader of shapes wants it there.
_LARGEST_IN_MESSAGE = 256


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises InputError, naming the file and the reason, when it is missing, truncated or not ONNX;
    when external data is missing, too short or outside the file's folder; when check_structure or
    onnx's checker refuses the graph; when a float weight holds NaN or infinity; or when it is
    quantized already.
    """
    model = read_message(path)
    refuse_quantized(model, path)
    try:
        check_structure(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for tensor in stored_tensors(model):
        if is_external(tensor):
            read_external(tensor, path)
        where = f"{path}: weight {tensor.name!r}"
        check_finite(read_tensor(tensor, where), where)
    try:
        if weight_bytes(model) < LARGEST_SINGLE_FILE:
            onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a valid ONNX graph: {first_line(error)}") from error
    return model


def load_graph(path: Path) -> gs.Graph:
    """Read an ONNX file (see load_model) as a graph that owns its weights."""
    return import_graph(load_model(path))


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Turn a model into a graph whose weights are loaded once, so that copies share them."""
    graph = gs.import_onnx(model)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = packed(np.asarray(tensor.values))
    return graph


def save_graph(graph: gs.Graph, path: Path, *, largest: int | None = None) -> None:
    """Write a graph as ONNX, weights in `NAME.onnx.data` beside it when they pass 2 GB.

    `largest`: bytes of weights that go into the file itself, in place of 2 GB. Those beside it are
    written one at a time: a message of them all would hold them twice.
    Raises InputError when the file cannot be written, onnx's ValidationError when the graph is not
    valid. The file is checked after writing; callers rename it into place.
    """
    size = constant_bytes(graph)
    check_free(path, size)
    if size <= (LARGEST_SINGLE_FILE if largest is None else largest):
        save_model(gs.export_onnx(graph), path)
        return
    bare, weights = detach_weights(graph, _LARGEST_IN_MESSAGE)
    model = gs.export_onnx(bare)
    inputs = [item for item in model.graph.input if item.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    data = data_file(path)
    try:
        with data.open("wb") as file:
            for name, values in weights.items():
                model.graph.initializer.append(_write_external(name, values, file, data.name))
        onnx.save(model, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    onnx.checker.check_model(os.fspath(path))


def _write_external(
    name: str, values: NDArray[Any], file: BinaryIO, location: str
) -> onnx.TensorProto:
    """Append a weight to the data file, where a page begins so that it can be mapped."""
    file.seek(-(-file.tell() // _PAGE) * _PAGE)
    tensor = onnx.TensorProto(
        name=name,
        dims=values.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    entries = {"location": location, "offset": file.tell(), "length": values.nbytes}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    if isinstance(values, PackedFloat4):
        file.write(values.tobytes())
    else:
        np.ascontiguousarray(values).tofile(file)
    let_go(values)
    return tensor


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as ONNX; see save_graph."""
    external, data = weight_bytes(model) > LARGEST_SINGLE_FILE, data_file(path)
    try:
        data.unlink(missing_ok=True)  # onnx writes behind what is there
        onnx.save(
            model,
            path,
            save_as_external_data=external,
            location=data.name if external else None,
        )
        if external:
            data.chmod(path.stat().st_mode)  # onnx lets nobody else read it
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except EncodeError as error:
        raise InputError(f"{path}: the graph is too large for one ONNX file") from error
    onnx.checker.check_model(os.fspath(path))


def constant_bytes(graph: gs.Graph) -> int:
    """Size of all constants of a graph in bytes."""
    tensors = graph.tensors().values()
    return sum(item.values.nbytes for item in tensors if isinstance(item, gs.Constant))


def weight_bytes(model: onnx.ModelProto) -> int:
    """Size of all initializers in bytes, data that is still external included."""
    return sum(
        int(np.prod(weight.dims, dtype=np.int64))
        * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        for weight in model.graph.initializer
    )
