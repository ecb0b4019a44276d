"""An onnx.ModelProto in memory, written to a file one weight at a time.

Protobuf would hold every weight once more while it serialises a whole model, and refuses 2 GB.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import EncodeError

from regcache.passes.errors import InputError
from regcache.passes.external_weights import is_external, stored_tensors
from regcache.passes.model_files import data_file

# What stays in the message itself: readers of shapes want it there.
_LARGEST_IN_MESSAGE = 256
_PAGE = 4096


def write_message(model: onnx.ModelProto, path: Path, name: str) -> None:
    """Write `model` to `path`, its weights to `NAME.onnx.data` beside it; `model` is left alone.

    Raises InputError, beginning with `name`, where there is no graph in it, its weights lie in
    other files, what is left without weights passes 2 GB, or the file cannot be written. What else
    may be wrong with it is found when the file is read.
    """
    if not model.graph.node:
        raise InputError(f"{name}: there is no graph in it")
    outside = next((tensor for tensor in stored_tensors(model) if is_external(tensor)), None)
    if outside is not None:
        raise InputError(
            f"{name}: weight {outside.name!r} lies in another file: load the model with its "
            "external data, or give its path"
        )
    shell = onnx.ModelProto()
    _copy_fields(model, shell, but="graph")
    _copy_fields(model.graph, shell.graph, but="initializer")
    data = data_file(path)
    try:
        with data.open("wb") as file:
            for tensor in model.graph.initializer:
                shell.graph.initializer.append(_written(tensor, file, data.name))
        onnx.save(shell, path)
    except OSError as error:
        raise InputError(f"{name}: {path.name}: {error.strerror or error}") from error
    except (EncodeError, ValueError) as error:
        raise InputError(f"{name}: passes 2 GB without its initializers") from error


def _copy_fields(message: Any, copy: Any, *, but: str) -> None:
    """Set every field of a message in an empty one of its type, except one."""
    for field, value in message.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "extend"):
            getattr(copy, field.name).extend(value)
        elif field.message_type is not None:
            getattr(copy, field.name).CopyFrom(value)
        else:
            setattr(copy, field.name, value)


def _written(tensor: onnx.TensorProto, file: BinaryIO, location: str) -> onnx.TensorProto:
    """The tensor with its numbers appended to the data file, or itself where it holds few.

    What is stored in other fields than bytes or floats stays in the message too.
    """
    numbers = tensor.raw_data or np.asarray(tensor.float_data, "<f4").tobytes()
    if len(numbers) <= _LARGEST_IN_MESSAGE:
        return tensor
    file.seek(-(-file.tell() // _PAGE) * _PAGE)  # so that it can be mapped
    written = onnx.TensorProto(
        name=tensor.name,
        dims=tensor.dims,
        data_type=tensor.data_type,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    entries = {"location": location, "offset": file.tell(), "length": len(numbers)}
    for key, value in entries.items():
        written.external_data.add(key=key, value=str(value))
    file.write(numbers)
    return written
