"""Weights that an ONNX file keeps in other files beside it, mapped and not copied."""

import mmap
import os
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.passes.message_graphs import subgraphs
from regcache.passes.stored_tensors import shape_and_type

Array = NDArray[np.generic]

# What the names of files begin with that hold mapped weights for a while, in any folder.
KEPT = ".weights-"


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a model: initializers, attributes, and those of its functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's numbers lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def map_external(tensor: onnx.TensorProto, path: Path) -> Array:
    """The numbers of an external tensor of the model at `path`, mapped read-only from its file.

    Raises InputError, naming the model and the tensor, when the file is missing, no regular file,
    outside the model's folder (links followed) or too short, or when the offset or length does not
    fit the tensor's shape and type.
    """
    where = f"{path}: external data of {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _inside(path, entries.get("location", ""), where)
    shape, dtype = shape_and_type(tensor, where)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or size)
    except ValueError as error:
        raise InputError(f"{where} has an offset or length that is no number") from error
    if offset < 0 or length != size:
        raise InputError(f"{where} does not fit {list(shape)} of {dtype}: {offset=}, {length=}")
    if offset + size > file.stat().st_size:
        raise InputError(f"{where} is truncated: {file.name!r}")
    if not size:
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", offset, shape)


def keep_weights(arrays: Sequence[Array], folder: Path) -> list[Array]:
    """The same arrays, mapped read-only from a new file in `folder`, named KEPT and more.

    The file goes with the last array that is mapped from it.
    """
    descriptor, name = tempfile.mkstemp(prefix=KEPT, dir=folder)
    path, end, offsets = Path(name), 0, []
    with open(descriptor, "wb") as file:
        for values in arrays:
            offsets.append(-(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
            file.seek(offsets[-1])
            np.ascontiguousarray(values).tofile(file)
            file.flush()
            end = offsets[-1] + values.nbytes
    left = len(arrays)

    def forget() -> None:
        nonlocal left
        left -= 1
        if not left:
            path.unlink(missing_ok=True)

    mapped: list[Array] = []
    for values, offset in zip(arrays, offsets, strict=True):
        mapped.append(np.memmap(path, values.dtype, "r", offset, values.shape))
        weakref.finalize(mapping(mapped[-1]), forget)
    return mapped


def kept_at(values: Array) -> tuple[Path, int] | None:
    """The file of `keep_weights` and the offset where an array's numbers lie; None: in no such."""
    root = values
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not isinstance(root, np.memmap) or not values.flags.c_contiguous:
        return None
    file = root.filename
    if not isinstance(file, Path) or not file.name.startswith(KEPT) or not file.is_file():
        return None
    first, start = (item.__array_interface__["data"][0] for item in (values, root))
    return file, root.offset + first - start


def mapping(values: Array) -> mmap.mmap | None:
    """The mapping of a file that an array's numbers lie in; None where they lie in memory."""
    base: object = values
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def let_go(values: Array) -> None:
    """Let the system take back the memory of a mapped weight; it is read again where it is used."""
    mapped = mapping(values)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def read_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Bring an external tensor's numbers into the message. Raises InputError as map_external."""
    values = np.array(map_external(tensor, path))
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = values.tobytes()


def _inside(path: Path, location: str, where: str) -> Path:
    """The regular file at `location`, which must not leave the model's folder, not by a link."""
    folder = path.parent.resolve()
    relative = PurePosixPath(location.replace("\\", "/"))
    if not location or "\0" in location or relative.is_absolute():
        raise InputError(f"{where} points outside the model's folder: {location!r}")
    try:
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise InputError(f"{where} points outside the model's folder: {location!r}")
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except FileNotFoundError as error:
        raise InputError(f"{where} is missing: {location!r}") from error
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        raise InputError(f"{where}: {location!r} cannot be read") from error
    if not regular:
        raise InputError(f"{where} is no regular file: {location!r}")
    return file


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(
    nodes: Iterable[onnx.NodeProto],
) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in subgraphs(node):
            yield from _graph_tensors(graph)
