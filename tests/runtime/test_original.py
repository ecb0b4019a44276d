"""Somebody else's file, run as it stands."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.small_models import Draft, Shape

from regcache.passes.errors import InputError
from regcache.runtime.original import OriginalSession, relative_error

IMAGES = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)


def write(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "original.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def mixing(batch: Any, held: int | None = None) -> onnx.ModelProto:
    """Each image less the mean of its batch, so that it shows which images ran together."""
    draft = Draft()
    x = "image"
    if held is not None:
        x = draft.node("Reshape", x, draft.weight(np.array([held, 3, 4, 4])))
    mean = draft.node("ReduceMean", x, draft.weight(np.array([0])))
    draft.node("Sub", x, mean, outputs=["less"])
    draft.node("ReduceSum", "less", draft.weight(np.array([1, 2, 3])), outputs=["sum"])
    return draft.model({"image": [batch, 3, 4, 4]}, ["sum", "less"], ir_version=8)


def in_groups(size: int) -> NDArray[np.float64]:
    """What `mixing` computes when `size` images run at a time, the last repeated to fill up."""
    padded = np.concatenate([IMAGES, np.repeat(IMAGES[-1:], -len(IMAGES) % size, 0)])
    groups = padded.astype(np.float64).reshape(-1, size, 3, 4, 4)
    less: NDArray[np.float64] = groups - groups.mean(1, keepdims=True)
    return less.reshape(-1, 3, 4, 4)[: len(IMAGES)]


@pytest.mark.parametrize(
    ("batch", "held", "told", "size"),
    [("n", None, None, 1), (None, None, None, 1), (1, None, None, 1), (2, None, None, 2),
     (8, None, None, 8), ("n", None, 3, 3), ("n", 4, 4, 4)],
)  # fmt: skip
def test_as_many_images_at_a_time_as_the_file_takes(
    batch: Any, held: int | None, told: int | None, size: int, tmp_path: Path
) -> None:
    path = write(mixing(batch, held), tmp_path)
    with OriginalSession(path, "image", threads=1) as session:
        less, total = session.run(IMAGES, ["less", "sum"], told)
    assert less.dtype == total.dtype == np.float64
    np.testing.assert_allclose(less, in_groups(size), rtol=1e-5, atol=1e-6)
    assert total.shape == (5, 1, 1, 1)


def test_shapes_inside_that_do_not_fit_are_said(tmp_path: Path) -> None:
    path = write(mixing("n", held=4), tmp_path)
    with OriginalSession(path, "image", threads=1) as session:
        with pytest.raises(InputError, match=r"original\.onnx: ONNX Runtime: ") as caught:
            session.run(IMAGES, ["less"])
        with pytest.raises(InputError, match="ONNX Runtime"):
            session.run(IMAGES, ["no such output"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8])
def test_images_of_another_type(dtype: type, tmp_path: Path) -> None:
    draft, kind = Draft(), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    y = draft.node("Cast", "image", to=TensorProto.FLOAT)
    images = np.abs(IMAGES * 50)
    path = write(draft.model({"image": ["n", 3, 4, 4]}, [y], dtype=kind, ir_version=8), tmp_path)
    with OriginalSession(path, "image", threads=1) as session:
        (found,) = session.run(images, [y])
    np.testing.assert_array_equal(found, images.astype(dtype).astype(np.float64))


def test_other_inputs_are_filled(tmp_path: Path) -> None:
    """Texts with ones, as many as there are images unless the file says; masks as they are told."""
    draft = Draft()
    draft.node("Add", "image", "mask", outputs=["masked"])
    sizes = [draft.node("Shape", name) for name in ("ids", "fixed", "mask")]
    row = draft.node("Concat", *sizes, axis=0)
    draft.node("Unsqueeze", row, draft.weight(np.array([0])), outputs=["shapes"])
    draft.node("ReduceMax", "ids", keepdims=0, outputs=["word"])
    model = draft.model({"image": [2, 3, 4, 4]}, ["masked"], ir_version=8)
    others: list[tuple[str, int, Shape]] = [
        ("ids", TensorProto.INT64, ["n", "length"]),
        ("fixed", TensorProto.BOOL, [7, 9]),
        ("mask", TensorProto.FLOAT, ["n", 1, 1, "t"]),
    ]
    for name, kind, shape in others:
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    for name in ("shapes", "word"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, None))
    path = write(model, tmp_path)
    with OriginalSession(path, "image", masks={"mask": -2.0}, threads=1) as session:
        masked, word, shapes = session.run(IMAGES[:4], ["masked", "word", "shapes"])
    np.testing.assert_allclose(masked, IMAGES[:4].astype(np.float64) - 2, rtol=1e-6)
    assert word.tolist() == [1, 1]  # a number for every run
    assert shapes.tolist() == [[2, 8, 7, 9, 2, 1, 1, 1]] * 2


def test_files_that_do_not_load(tmp_path: Path) -> None:
    path = tmp_path / "original.onnx"
    with pytest.raises(InputError, match=r"original\.onnx: ONNX Runtime: "):
        OriginalSession(path, "image")
    draft = Draft()
    model = draft.model({"image": [1, 3, 4, 4]}, [draft.node("Relu", "image")], ir_version=8)
    model.graph.input.append(helper.make_tensor_value_info("text", TensorProto.STRING, [1]))
    with pytest.raises(InputError, match=r"input 'text' is of type tensor\(string\)"):
        OriginalSession(write(model, tmp_path), "image")


VALUES = hnp.arrays(np.float64, (3, 4), elements=st.floats(-100, 100))


@given(wanted=VALUES, noise=VALUES, row=st.integers(0, 2))
def test_the_worst_image_counts(wanted: Any, noise: Any, row: int) -> None:
    wanted = wanted + 200
    found = wanted.copy()
    found[row] += noise[row]
    ratio = np.linalg.norm(noise[row]) / np.linalg.norm(wanted[row])
    assert relative_error(found, wanted) == pytest.approx(ratio, abs=1e-12)
    shaped = (item.reshape(3, 2, 2) for item in (found, wanted))
    assert relative_error(*shaped) == pytest.approx(ratio, abs=1e-12)


def test_what_is_not_finite() -> None:
    """Infinities at the same places are the same; at others nothing is."""
    wanted = np.array([[1.0, np.inf], [2.0, -np.inf]])
    assert relative_error(wanted.copy(), wanted) == 0
    assert relative_error(np.array([[1.0, np.inf], [4.0, -np.inf]]), wanted) == 1
    assert relative_error(np.nan_to_num(wanted), wanted) == np.inf
    assert relative_error(wanted[:1], wanted) == np.inf
    assert relative_error(np.ones((1, 2)), np.zeros((1, 2))) > 1e30
