"""Write a traced model to disk one weight at a time.

Protobuf would hold every weight twice more in memory while it serialises a whole model.
"""

from pathlib import Path
from typing import IO, TYPE_CHECKING

from regcache.passes.model_files import check_free, data_file
from regcache.passes.onnx_file import LARGEST_SINGLE_FILE

if TYPE_CHECKING:
    import onnx
    import onnx_ir

_LENGTH_DELIMITED = 2  # protobuf's wire type of messages


def save_model(model: "onnx_ir.Model", path: Path) -> None:
    """Write the model as one ONNX file; weights past 2 GB go to `NAME.onnx.data` beside it.

    The model's initializers are taken out of it.
    """
    import onnx_ir

    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    size = sum(weight.nbytes for weight in weights.values())
    check_free(path, size)
    if size > LARGEST_SINGLE_FILE:
        onnx_ir.save(model, path, external_data=data_file(path).name)
        return
    model.graph.initializers.clear()
    with path.open("wb") as file:
        _write_model(onnx_ir.to_proto(model), weights, file)


def _write_model(
    shell: "onnx.ModelProto", weights: "dict[str, onnx_ir.TensorProtocol]", file: IO[bytes]
) -> None:
    """ModelProto { ..., graph { ..., initializer, initializer, ... } } in protobuf's encoding."""
    graph_field = _tag(shell, "graph")
    weight_field = _tag(shell.graph, "initializer")
    graph = shell.graph.SerializeToString()
    shell.ClearField("graph")
    heads = []
    for name, weight in weights.items():
        bare = _bare(name, weight)
        size = len(bare) + weight.nbytes
        heads.append(weight_field + _varint(size) + bare)
    numbers = sum(weight.nbytes for weight in weights.values())
    file.write(shell.SerializeToString())
    file.write(graph_field + _varint(len(graph) + numbers + sum(map(len, heads))))
    file.write(graph)
    for head, weight in zip(heads, weights.values(), strict=True):
        file.write(head)
        file.write(weight.tobytes())


def _bare(name: str, weight: "onnx_ir.TensorProtocol") -> bytes:
    """A TensorProto up to its numbers, the field `raw_data`, which are to follow."""
    import onnx

    proto = onnx.TensorProto(
        name=name,  # the exporter renames the initializer, not the tensor in it
        dims=weight.shape.numpy(),
        data_type=weight.dtype.value,
    )
    return proto.SerializeToString() + _tag(proto, "raw_data") + _varint(weight.nbytes)


def _tag(message: "onnx.ModelProto | onnx.GraphProto | onnx.TensorProto", field: str) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | _LENGTH_DELIMITED)


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first, the top bit set on all but the last."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
