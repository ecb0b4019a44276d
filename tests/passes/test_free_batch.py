"""A graph of a fixed batch, freed, computes for any number of images what one alone makes of each.

What the freed graph is held against: float64 numpy, or the same graph written for a batch of 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.batch_chains import BatchChain
from support.batch_graphs import IMAGES, floats, freed, ints, tokens, written
from support.examples import examples
from support.running import run_graph
from support.small_models import Draft, with_shapes
from support.spellings import SPELLINGS
from support.tiny_vit import TinyVit

from regcache.passes.base import Skip, run
from regcache.passes.batch_place import Place, reshaped_places
from regcache.passes.errors import InputError
from regcache.passes.free_batch import BATCH, FreeBatch
from regcache.passes.lower_einsum import LowerEinsum
from regcache.passes.raise_opset import raise_opset
from regcache.passes.settle import settle

Build = Callable[[Draft, int], str]


@pytest.mark.slow
@examples(120)
@given(seed=st.integers(0, 10**9), batch=st.sampled_from([1, 2, 3, 8]), steps=st.integers(1, 14))
def test_random_chains(seed: int, batch: int, steps: int) -> None:
    """Heads merged with the batch, constants for every image, Slice, Expand, Concat and others."""
    chain = BatchChain(seed, batch, steps)
    graph = freed(with_shapes(chain.model()))
    for count in (1, 2, 5):
        (found,) = run_graph(graph, IMAGES[:count])
        np.testing.assert_allclose(found, chain.reference(IMAGES[:count]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", SPELLINGS)
def test_encoders_of_a_fixed_batch(name: str, batch: int) -> None:
    """Their shape arithmetic becomes numbers that hold the batch, and is freed of it."""
    vit = TinyVit(SPELLINGS[name])
    model = vit.model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = batch
    settled = settle(with_shapes(raise_opset(model)))
    graph = freed(run(LowerEinsum(), settled).graph)
    for count in (1, 3):
        images = vit.images(count)
        for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_output_that_the_images_have_no_part_in() -> None:
    draft = Draft()
    outputs = [draft.node("Relu", "image"), draft.node("Identity", floats(draft, 4))]
    graph = with_shapes(draft.model({"image": [4, 3, 4, 4]}, outputs))
    reason = "cannot be freed: the output 'n1_Identity' does not depend on the image"
    assert run(FreeBatch(), graph).log.skips == (Skip("batch", reason),)


def test_several_outputs_are_freed_together() -> None:
    draft = Draft()
    outputs = [tokens(draft, 4), draft.node("GlobalMaxPool", "image")]
    graph = freed(with_shapes(draft.model({"image": [4, 3, 4, 4]}, outputs)))
    assert [item.shape for item in graph.outputs] == [[BATCH, 4, 12], [BATCH, 3, 1, 1]]
    assert [len(item) for item in run_graph(graph, IMAGES)] == [5, 5]


@pytest.mark.parametrize("shape", [["n", 3, 4, 4], [4, 3, "h", 4], None])
def test_inputs_that_are_not_static_are_refused(shape: Any) -> None:
    draft = Draft()
    graph = with_shapes(draft.model({"image": shape}, [draft.node("Relu", "image")]))
    with pytest.raises(InputError, match="one input of static shape"):
        run(FreeBatch(), graph)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_class_token_is_repeated_for_as_many_images_as_there_are(batch: int) -> None:
    """Expanded for the batch, as exporters write it. Arguments that hold the batch are exchanged
    and one Shape node tells how many images there are; other nodes stay."""

    def build(draft: Draft, batch: int) -> str:
        token = draft.node("Expand", floats(draft, 1, 1, 12), ints(draft, batch, 1, 12))
        return draft.node("Concat", token, tokens(draft, batch), axis=-2)

    settled = settle(written(build, batch))
    after = freed(settled)
    assert [node.op for node in settled.nodes] == ["Reshape", "Concat"]
    assert [node.op for node in after.nodes] == ["Reshape", "Shape", "Concat", "Expand", "Concat"]
    assert after.nodes[0].inputs[1].values.tolist() == [-1, 4, 12]
    (found,) = run_graph(after, IMAGES)
    (wanted,) = run_graph(written(build, 5), IMAGES)
    np.testing.assert_array_equal(found, wanted)


@given(
    before=st.lists(st.integers(1, 4), max_size=2),
    after=st.lists(st.integers(1, 4), max_size=2),
    batch=st.integers(1, 5),
    data=st.data(),
)
def test_places_after_a_reshape(
    before: list[int], after: list[int], batch: int, data: st.DataObject
) -> None:
    """Numbers that tell their image: where a place is found, every image is at its own part."""
    source = [*before, batch, *after]
    flat = [n for n in (*before, batch, *after) if n > 1] or [1]
    cuts = data.draw(st.lists(st.booleans(), min_size=len(flat) - 1, max_size=len(flat) - 1))
    result = [flat[0]]
    for number, cut_here in zip(flat[1:], cuts, strict=True):
        if cut_here:
            result.append(number)
        else:
            result[-1] *= number
    places = reshaped_places(Place(len(before)), source, result, batch)
    assert places
    assert batch == 1 or len(places) == 1
    images = np.arange(batch).reshape([1] * len(before) + [batch] + [1] * len(after))
    values: NDArray[Any] = np.broadcast_to(images, source).reshape(result)
    for place in places:
        split_axis = (place.outer, batch, place.inner)
        parts = values.reshape([*result[: place.axis], *split_axis, *result[place.axis + 1 :]])
        by_image = np.moveaxis(parts, place.axis + 1, 0).reshape(batch, -1)
        assert (by_image == np.arange(batch)[:, None]).all()
