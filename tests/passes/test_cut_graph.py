"""Stretches of an encoder, run one after another, compute what the whole encoder does."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.examples import examples
from support.registers import RANGES, random_kv
from support.running import run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Registers, Spec, TinyVit
from support.untouched import told

from regcache.passes.base import run
from regcache.passes.cut_graph import cut_graph
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.splice_registers import SpliceRegisters

OUTPUTS = ["pooled", "last_hidden_state"]


def boundaries(view: EncoderView) -> list[str]:
    """The hidden state at the input of every block, and after the last."""
    return [block.input.name for block in view.blocks] + [view.blocks[-1].output.name]


def run_in_parts(
    graph: gs.Graph, names: list[str], images: NDArray[np.float32]
) -> list[NDArray[Any]]:
    """The outputs, with the graph cut at each of the named tensors, which follow each other."""
    hidden = images
    for start, end in zip([None, *names], names, strict=False):
        (hidden,) = run_graph(cut_graph(graph, start, [end]), hidden)
    return run_graph(cut_graph(graph, names[-1], OUTPUTS), hidden)


@pytest.mark.parametrize("name", SPELLINGS)
def test_stem_and_tail_compute_the_reference(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    before = told(graph)
    batches = [vit.images(batch) for batch in (1, 3, 8)]
    whole = [run_graph(graph, images) for images in batches]
    truth = [vit.reference(images) for images in batches]
    for boundary in boundaries(view_encoder(graph)):
        stem, tail = cut_graph(graph, None, [boundary]), cut_graph(graph, boundary, OUTPUTS)
        onnx.checker.check_model(gs.export_onnx(tail), full_check=True)
        assert [item.name for item in tail.inputs] == [boundary]
        for images, wanted, exact in zip(batches, whole, truth, strict=True):
            found = run_graph(tail, run_graph(stem, images)[0])
            for one, same, formula in zip(found, wanted, exact, strict=True):
                np.testing.assert_allclose(one, same, rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(one, formula, rtol=1e-4, atol=1e-5)
    assert told(graph) == before


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_block_alone_is_an_encoder_of_one_block(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    view = view_encoder(graph)
    streams = boundaries(view)
    for block, start, end in zip(view.blocks, streams, streams[1:], strict=False):
        alone = view_encoder(cut_graph(graph, start, [end]))
        assert len(alone.blocks) == 1
        assert (alone.heads, alone.head_dim, alone.width) == (view.heads, view.head_dim, view.width)
        (found,) = alone.blocks
        assert (found.input.name, found.output.name) == (start, end)
        for ours, whole in zip(found.linears, block.linears, strict=True):
            assert ours.weight is whole.weight  # shared, not copied
            assert ours.input.name == whole.input.name
    images = vit.images(3)
    for one, other in zip(
        run_in_parts(graph, streams, images), run_graph(graph, images), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "merged heads", "attention operator, rank 3"])
@pytest.mark.parametrize(("start", "end"), RANGES)
def test_registers_on_either_side_of_the_cut(name: str, start: int, end: int) -> None:
    """Their Expand reads the batch from the images, which are not there behind the cut."""
    vit = TinyVit(SPELLINGS[name])
    keys, values = random_kv(vit.spec, end - start, 4)
    graph = canonical_graph(vit.model())
    spliced = run(SpliceRegisters(start, end, keys, values), graph).graph
    assert any(node.op == "Expand" and "kv" in node.name for node in spliced.nodes)
    images = vit.images(3)
    wanted = vit.reference(images, Registers(start, end, keys, values))
    for boundary in boundaries(view_encoder(spliced)):
        found = run_in_parts(spliced, [boundary], images)
        for one, truth in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-4)


def test_several_tensors_in_the_order_asked_for() -> None:
    vit = TinyVit(Spec(depth=3))
    graph = canonical_graph(vit.model())
    streams = boundaries(view_encoder(graph))
    names = [streams[3], "pooled", streams[1], streams[2]]
    images = vit.images(2)
    found = run_graph(cut_graph(graph, None, names), images)
    for name, one in zip(names, found, strict=True):
        np.testing.assert_array_equal(one, run_graph(cut_graph(graph, None, [name]), images)[0])
    assert [item.name for item in cut_graph(graph, streams[1], names[:2]).outputs] == names[:2]


def test_a_cut_at_the_images_is_none() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    by_name, plain = (cut_graph(graph, start, OUTPUTS) for start in ("pixel_values", None))
    assert gs.export_onnx(by_name) == gs.export_onnx(plain)


@examples(10)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 5),
    grid=st.integers(2, 3),
    prefix=st.integers(0, 3),
    depth=st.integers(1, 3),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_random_encoders_cut_in_random_places(
    heads: int, head_dim: int, grid: int, prefix: int, depth: int, batch: int, seed: int, data: Any
) -> None:
    spec = Spec(
        width=heads * head_dim, heads=heads, depth=depth, hidden=9, grid=grid, prefix=prefix,
        layer_scale=bool(seed % 2), gemm=bool(seed % 3 == 0), dynamic_shapes=bool(seed % 5 == 0),
        pooling_head=prefix == 0, seed=seed,
    )  # fmt: skip
    vit = TinyVit(spec)
    graph = canonical_graph(vit.model())
    places = st.sets(st.integers(0, depth), min_size=1)
    streams = boundaries(view_encoder(graph))
    names = [streams[index] for index in sorted(data.draw(places))]
    images = vit.images(batch, seed)
    wanted = vit.reference(images)
    for found, truth in zip(run_in_parts(graph, names, images), wanted, strict=True):
        assert np.abs(found - truth).max() <= 2e-4 * max(1.0, float(np.abs(truth).max()))


class TestRefusals:
    @pytest.fixture
    def graph(self) -> gs.Graph:
        return canonical_graph(TinyVit(Spec()).model())

    def refuse(self, graph: gs.Graph, start: str | None, outputs: list[str], match: str) -> None:
        before = told(graph)
        with pytest.raises(InputError, match=match):
            cut_graph(graph, start, outputs)
        assert told(graph) == before

    def test_no_such_tensor(self, graph: gs.Graph) -> None:
        self.refuse(graph, None, ["pooled", "nothing"], "no tensor 'nothing'")
        self.refuse(graph, "nowhere", ["pooled"], "no tensor 'nowhere'")

    def test_an_output_before_the_start(self, graph: gs.Graph) -> None:
        first, second, _ = boundaries(view_encoder(graph))
        self.refuse(graph, second, ["pooled", first], f"'{first}' does not come after")

    def test_indices_of_deleted_sinks(self, graph: gs.Graph) -> None:
        """The full-length output puts the kept patches back to where they stood."""
        deleted = run(DeleteSinks(0, 2), graph).graph
        behind = boundaries(view_encoder(deleted))[1]
        (kept,) = {node.outputs[1].name for node in deleted.nodes if node.op == "TopK"}
        self.refuse(deleted, behind, OUTPUTS, f"also needs '{kept}'")
        cut_graph(deleted, behind, ["pooled"])

    def test_rotary_tables_of_the_kept_patches(self) -> None:
        """Gathered where the sinks are deleted, they serve the blocks behind too."""
        vit = TinyVit(Spec(prefix=0, pooling_head=True, depth=3))
        graph = canonical_graph(vit.model())
        table = gs.Constant("cosines", np.random.default_rng(0).random((9, 8), dtype=np.float32))
        for block in view_encoder(graph).blocks:
            scores = block.attention.scores
            rotated = gs.Variable(f"rotated_{block.index}", np.float32)
            graph.nodes.append(
                gs.Node("Mul", rotated.name, {}, [scores.inputs[0], table], [rotated])
            )
            scores.inputs[0] = rotated
        graph.toposort()
        deleted = run(DeleteSinks(1, 2), graph).graph
        streams = boundaries(view_encoder(graph))
        for start in streams[:2]:
            cut_graph(deleted, start, ["pooled"])
        (mul,) = (node for node in deleted.nodes if node.name == "rotated_2")
        gathered = mul.inputs[1].name
        assert "table" in gathered
        self.refuse(deleted, streams[2], ["pooled"], f"Mul 'rotated_2' also needs '{gathered}'")

    def test_a_skip_around_the_start(self, graph: gs.Graph) -> None:
        first, second, _ = boundaries(view_encoder(graph))
        tensors = graph.tensors()
        skipped = gs.Variable("skipped", np.float32, ["batch", 10, 16])
        inputs = [tensors["last_hidden_state"], tensors[first]]
        graph.nodes.append(gs.Node("Add", "skip", {}, inputs, [skipped]))
        graph.outputs.append(skipped)
        self.refuse(graph, second, ["skipped"], f"Add 'skip' also needs '{first}'")
        cut_graph(graph, first, ["skipped"])

    @pytest.mark.parametrize("index", [[0], [-1], [0, 2]])
    def test_a_size_of_the_images_other_than_the_batch(
        self, graph: gs.Graph, index: list[int]
    ) -> None:
        """Only Gather 0 of a whole shape reads nothing but the batch."""
        start = boundaries(view_encoder(graph))[1]
        shape, size = (gs.Variable(name, np.int64) for name in ("shape", "size"))
        constant = gs.Constant("index", np.array(index))
        graph.nodes.append(gs.Node("Shape", "shape", {}, [graph.inputs[0]], [shape]))
        graph.nodes.append(gs.Node("Gather", "size", {}, [shape, constant], [size]))
        if index == [0]:
            assert cut_graph(graph, start, ["pooled", "size"]).inputs[0].name == start
        else:
            self.refuse(graph, start, ["size"], "Shape 'shape' also needs 'pixel_values'")
