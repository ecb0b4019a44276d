"""Weights in other files: mapped, not copied, and never from outside the model's folder."""

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.small_models import Draft

from regcache.passes.errors import InputError
from regcache.passes.external_weights import (
    is_external,
    keep_weights,
    kept_at,
    let_go,
    map_external,
    read_external,
    stored_tensors,
)

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def external(
    location: object = "w.data", offset: object = None, length: object = None, **more: Any
) -> onnx.TensorProto:
    """A tensor that says where VALUES are."""
    tensor = TensorProto(name="w", dims=[3, 4], data_type=TensorProto.FLOAT, **more)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where the model would be, with its data beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.data").write_bytes(VALUES.tobytes())
    return folder / "model.onnx"


def refusal(tensor: onnx.TensorProto, model: Path) -> str:
    with pytest.raises(InputError) as caught:
        map_external(tensor, model)
    message = str(caught.value)
    assert message.startswith(f"{model}: external data of 'w'")
    assert "\n" not in message
    return message


def test_values_are_mapped(model: Path) -> None:
    found = map_external(external(), model)
    np.testing.assert_array_equal(found, VALUES)
    assert isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


@pytest.mark.parametrize("offset", [0, 4, 4096, 4097])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_any_type_at_any_offset(model: Path, dtype: Any, offset: int) -> None:
    values = np.arange(6).reshape(2, 3).astype(dtype)
    (model.parent / "w.data").write_bytes(bytes(offset) + values.tobytes() + bytes(9))
    tensor = external(offset=offset, length=values.nbytes)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor.dims[:] = [2, 3]
    found = map_external(tensor, model)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_empty_tensors_need_no_bytes(model: Path) -> None:
    tensor = external()
    tensor.dims[:] = [0, 4]
    (model.parent / "w.data").write_bytes(b"")
    assert map_external(tensor, model).shape == (0, 4)


def test_what_onnx_writes_is_read(model: Path) -> None:
    draft = Draft()
    y = draft.node("Add", "x", draft.weight(VALUES, "w"))
    written = draft.model({"x": [3, 4]}, [y])
    onnx.save(written, model, save_as_external_data=True, location="d.bin", size_threshold=0)
    (tensor,) = onnx.load(model, load_external_data=False).graph.initializer
    assert is_external(tensor)
    np.testing.assert_array_equal(map_external(tensor, model), VALUES)
    read_external(tensor, model)
    assert not is_external(tensor)
    assert not tensor.external_data
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), VALUES)


def test_folders_and_links_inside_are_followed(model: Path) -> None:
    (model.parent / "deep").mkdir()
    (model.parent / "w.data").rename(model.parent / "deep" / "w")
    (model.parent / "link").symlink_to("deep/w")
    for location in ("deep/w", "deep/../link", "./link"):
        np.testing.assert_array_equal(map_external(external(location), model), VALUES)


def test_a_model_reached_by_a_link_has_its_data_beside_the_link(model: Path) -> None:
    """And a folder reached by one is that folder."""
    other = model.parent.parent / "elsewhere"
    other.symlink_to(model.parent)
    np.testing.assert_array_equal(map_external(external(), other / "model.onnx"), VALUES)


@pytest.mark.parametrize(
    "location",
    [
        "",
        "../w.data",
        "/etc/passwd",
        "/dev/zero",
        "a/../../w.data",
        "C\0",
        "../model2/w",
    ],
)
def test_places_outside_the_folder(model: Path, location: str) -> None:
    (model.parent.parent / "w.data").write_bytes(VALUES.tobytes())
    assert "points outside the model's folder" in refusal(external(location), model)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "../outside", "/proc/self/mem"])
def test_links_that_leave_the_folder(model: Path, target: str) -> None:
    (model.parent.parent / "outside").write_bytes(VALUES.tobytes())
    (model.parent / "link").symlink_to(target)
    assert "points outside the model's folder" in refusal(external("link"), model)


def test_a_folder_that_is_a_link_outside(model: Path) -> None:
    (model.parent / "up").symlink_to("..")
    (model.parent.parent / "w").write_bytes(VALUES.tobytes())
    assert "points outside the model's folder" in refusal(external("up/w"), model)


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/{path.name}")  # a path of its own may be too long
        os.close(folder)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, _listen])
def test_what_is_no_file(model: Path, make: Callable[[Path], None]) -> None:
    """Found without opening it: a pipe that nobody writes to would be waited for."""
    make(model.parent / "odd")
    assert "is no regular file: 'odd'" in refusal(external("odd"), model)


def test_missing_files_and_endless_links(model: Path) -> None:
    assert "is missing: 'no'" in refusal(external("no"), model)
    assert "is missing: 'no/where'" in refusal(external("no/where"), model)
    (model.parent / "one").symlink_to("two")
    (model.parent / "two").symlink_to("one")
    assert "'one' cannot be read" in refusal(external("one"), model)
    assert "cannot be read" in refusal(external("w.data/below"), model)
    assert "cannot be read" in refusal(external("x" * 5000), model)


@pytest.mark.parametrize("number", ["ten", "", "0x10", "1.5", "9" * 5000, "-"])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_offsets_and_lengths_that_are_no_numbers(model: Path, key: str, number: str) -> None:
    tensor = external(**{key: number})
    if number:
        assert "has an offset or length that is no number" in refusal(tensor, model)
    else:  # as good as not said
        np.testing.assert_array_equal(map_external(tensor, model), VALUES)


@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        (-1, 48, r"does not fit \[3, 4\] of float32: offset=-1"),
        (0, 47, "does not fit"),
        (0, 49, "does not fit"),
        (0, 0, "does not fit"),
        (0, -48, "does not fit"),
        (0, 2**70, "does not fit"),
        (1, 48, "is truncated: 'w.data'"),
        (2**62, 48, "is truncated"),
        (2**80, 48, "is truncated"),
    ],
)
def test_offsets_and_lengths_that_do_not_fit(
    model: Path, offset: int, length: int, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        map_external(external(offset=offset, length=length), model)
    refusal(external(offset=offset, length=length), model)


@given(dims=st.lists(st.integers(-(2**40), 2**40), max_size=4))
def test_any_shape_is_read_or_refused(dims: list[int], tmp_path_factory: Any) -> None:
    """A file of 48 bytes: nothing larger is made, or waited for."""
    model = tmp_path_factory.getbasetemp() / "model.onnx"
    (model.parent / "w.data").write_bytes(VALUES.tobytes())
    tensor = external()
    tensor.dims[:] = dims
    size = 1
    for dim in dims:
        size *= dim
    if min(dims, default=0) >= 0 and size <= 12:
        assert map_external(tensor, model).shape == tuple(dims)
    else:
        refusal(tensor, model)


def test_a_sparse_file_takes_no_memory(model: Path) -> None:
    """64 GB of nothing are mapped, not read."""
    count = 1 << 34
    with (model.parent / "w.data").open("wb") as file:
        file.truncate(4 * count)
    tensor = external()
    tensor.dims[:] = [count]
    found = map_external(tensor, model)
    assert found.shape == (count,)
    assert found[-1] == 0
    tensor.dims[:] = [1 << 37]
    assert "has no such shape" in refusal(tensor, model)


def test_every_place_of_a_tensor_is_known() -> None:
    """Initializers, sparse ones, attributes, lists of them, branches and functions."""
    values = {name: numpy_helper.from_array(VALUES, name) for name in "abcdefg"}
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=values["c"])], "b", [], [], [values["d"]]
    )
    nodes = [
        helper.make_node("If", ["yes"], ["y"], then_branch=branch),
        helper.make_node("Odd", [], ["z"], many=[values["e"]]),
        helper.make_node("Constant", [], ["x"], value=values["b"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [values["a"]])
    graph.sparse_initializer.add().values.CopyFrom(values["g"])
    inner = [helper.make_node("Constant", [], ["f"], value=values["f"])]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("local", "F", [], ["f"], inner, opsets)
    model = helper.make_model(graph, functions=[function])
    names = [tensor.name for tensor in stored_tensors(model)]
    assert sorted(names) == sorted(["", *"abcdefg"])  # the indices of the sparse one have no name


def test_a_mapped_weight_that_was_let_go_reads_the_same(tmp_path: Path) -> None:
    stored = np.arange(4096, dtype=np.float32)
    stored.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float32, "r", shape=(64, 64))
    let_go(mapped[1:])
    let_go(stored)  # not mapped: nothing to give back
    np.testing.assert_array_equal(mapped, stored.reshape(64, 64))


def test_kept_weights_are_mapped_and_their_file_goes_with_the_last(tmp_path: Path) -> None:
    arrays: list[Any] = [VALUES, np.arange(70_000, dtype=np.int8)]
    kept = keep_weights(arrays, tmp_path)
    (file,) = tmp_path.iterdir()
    for values, mapped in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(mapped, values)
        assert mapped.dtype == values.dtype
        path, offset = kept_at(mapped) or (None, 0)
        assert path == file
        assert file.read_bytes()[offset:][: values.nbytes] == values.tobytes()
    row = kept.pop(0)[1:]
    assert kept_at(row) == (file, row.nbytes // 2)
    assert kept_at(row[:, ::2]) is None  # not in one piece
    del kept, mapped, path
    gc.collect()
    assert file.exists()  # a row is read still
    del row
    gc.collect()
    assert not file.exists()


def test_what_others_mapped_or_hold_is_not_kept(tmp_path: Path) -> None:
    VALUES.tofile(tmp_path / "weights.bin")
    mapped = np.memmap(tmp_path / "weights.bin", np.float32, "r")
    assert kept_at(mapped) is None
    assert kept_at(VALUES) is None
