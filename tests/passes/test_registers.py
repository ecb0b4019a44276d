"""Registers spliced in, sliced out, deleted sinks and their undoing, against float64 numpy."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.canonical import canonical_graph
from support.examples import examples
from support.registers import FREE, RANGES, random_kv, random_tokens
from support.running import run_batches, run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.compiler.curation.registers import capture_registers
from regcache.passes.base import Pass, Result, run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.count_flops import count_flops
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters
from regcache.passes.strip_registers import StripRegisters


def apply(step: Pass, graph: gs.Graph) -> Result:
    """Run a pass, check the graph with onnx in full, and that a second run is refused or idle."""
    result = run(step, graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    return result


def assert_computes(graph: gs.Graph, vit: TinyVit, plan: Registers) -> None:
    batches = [vit.images(batch, seed=batch) for batch in (1, 3, 8)]
    for images, outputs in zip(batches, run_batches(graph, batches), strict=True):
        # `kept` is filled as the reference runs.
        fresh = Registers(**{**plan.__dict__, "kept": []})
        for found, wanted in zip(outputs, vit.reference(images, fresh), strict=True):
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(("start", "end"), RANGES)
@pytest.mark.parametrize("count", [1, 4, 16])
def test_kv_registers(name: str, start: int, end: int, count: int) -> None:
    vit = TinyVit(SPELLINGS[name])
    keys, values = random_kv(vit.spec, end - start, count)
    graph = canonical_graph(vit.model())
    result = apply(SpliceRegisters(start, end, keys, values), graph)
    assert len(result.log.edits) == end - start
    added = ops(result.graph) - ops(graph)
    merged = 2 * (end - start) if name == "merged heads" else 0
    assert added == Counter(
        {
            "Concat": 2 * (end - start) + 1,
            "Expand": 2 * (end - start),
            "Shape": 1,
            "Reshape": merged,
        }
    )
    assert_computes(result.graph, vit, Registers(start, end, keys, values))


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(("start", "end"), RANGES)
@pytest.mark.parametrize("count", [1, 4, 16])
def test_token_registers(name: str, start: int, end: int, count: int) -> None:
    vit = TinyVit(SPELLINGS[name])
    tokens = random_tokens(vit.spec, count)
    graph = canonical_graph(vit.model())
    result = apply(SpliceRegisterTokens(start, end, tokens), graph)
    assert len(result.log.edits) == 1
    assert ops(result.graph) - ops(graph) == {"Concat": 2, "Expand": 1, "Shape": 1, "Slice": 1}
    assert_computes(result.graph, vit, Registers(start, end, tokens=tokens))


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_deleted_sinks(name: str, block: int, count: int) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = apply(DeleteSinks(block, count), graph)
    assert len(result.log.edits) == 1
    assert_computes(result.graph, vit, Registers(block, sinks=count))


@pytest.mark.parametrize("name", SPELLINGS)
def test_captured_registers(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    view = view_encoder(canonical_graph(vit.model()))
    for start, end in RANGES:
        for count in (1, 5):
            tokens = random_tokens(vit.spec, count, seed=count)
            found = capture_registers(view, start, end, tokens)
            for ours, wanted in zip(found, vit.capture(tokens, start, end), strict=True):
                assert ours.shape == wanted.shape
                np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FREE)
def test_no_register_leaves_every_byte(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    before = gs.export_onnx(graph).SerializeToString()
    empty = random_kv(vit.spec, 2, 0)
    for step in (
        SpliceRegisters(0, 2, *empty),
        SpliceRegisterTokens(0, 2, random_tokens(vit.spec, 0)),
        DeleteSinks(1, 0),
        StripRegisters(),
    ):
        result = run(step, graph)
        assert not result.changed
        assert gs.export_onnx(result.graph).SerializeToString() == before


@pytest.mark.parametrize("name", FREE)
def test_strip_gives_the_original_back(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    images = vit.images(3)
    before = run_graph(graph, images)
    keys, values = random_kv(vit.spec, 2, 4)
    spliced = run(SpliceRegisters(0, 2, keys, values), graph).graph
    both = run(SpliceRegisterTokens(1, 2, random_tokens(vit.spec, 3)), spliced).graph
    for with_registers in (spliced, both):
        stripped = apply(StripRegisters(), with_registers)
        assert stripped.changed
        assert ops(stripped.graph) == ops(graph)
        for found, wanted in zip(run_graph(stripped.graph, images), before, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert not run(StripRegisters(), stripped.graph).changed


def test_both_levers_and_quantization_together() -> None:
    """Delete, prefix, then quantize: the integers see the spliced graph, and strip still works."""
    vit = TinyVit(Spec(depth=3))
    graph = canonical_graph(vit.model())
    shorter = run(DeleteSinks(1, 2), graph).graph
    keys, values = random_kv(vit.spec, 2, 4)
    spliced = run(SpliceRegisters(1, 3, keys, values), shorter).graph
    quantized = apply(QuantizeLinears(linear_scales(spliced)), spliced)
    assert len(quantized.log.edits) == 12
    images = vit.images(2)
    exact = run_graph(spliced, images)
    for found, wanted in zip(run_graph(quantized.graph, images), exact, strict=True):
        assert 0 < np.abs(found - wanted).mean() < 0.1
    stripped = run(StripRegisters(), quantized.graph).graph
    assert not any("kv" in node.name for node in stripped.nodes if node.op == "Concat")
    # The other order: registers go into a graph that is quantized already.
    late = run(
        SpliceRegisters(1, 3, keys, values), run(QuantizeLinears(linear_scales(graph)), graph).graph
    )
    assert len(late.log.edits) == 2


def test_a_fixed_batch_needs_no_expansion() -> None:
    vit = TinyVit(Spec())
    model = vit.model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    graph = canonicalize(model)
    keys, values = random_kv(vit.spec, 2, 4)
    result = apply(SpliceRegisters(0, 2, keys, values), graph)
    assert ops(result.graph) - ops(graph) == {"Concat": 4}
    images = vit.images(3)
    wanted = vit.reference(images, Registers(0, 2, keys, values))
    np.testing.assert_allclose(run_graph(result.graph, images)[0], wanted[0], atol=1e-4)


class TestRefusals:
    @pytest.fixture
    def vit(self) -> TinyVit:
        return TinyVit(Spec())

    @pytest.fixture
    def graph(self, vit: TinyVit) -> gs.Graph:
        return canonical_graph(vit.model())

    def refuse(self, step: Pass, graph: gs.Graph, message: str) -> None:
        with pytest.raises(InputError, match=message):
            run(step, graph)

    @pytest.mark.parametrize(("start", "end"), [(-1, 1), (1, 1), (2, 1), (0, 3)])
    def test_ranges(self, graph: gs.Graph, vit: TinyVit, start: int, end: int) -> None:
        blocks = max(end - start, 0)
        keys, values = random_kv(vit.spec, blocks, 1)
        self.refuse(SpliceRegisters(start, end, keys, values), graph, "no range within 2 blocks")
        tokens = random_tokens(vit.spec, 1)
        self.refuse(SpliceRegisterTokens(start, end, tokens), graph, "no range within 2 blocks")

    def test_shapes_and_values(self, graph: gs.Graph, vit: TinyVit) -> None:
        keys, values = random_kv(vit.spec, 1, 2)
        self.refuse(SpliceRegisters(0, 2, keys, values), graph, "does not fit 2 blocks")
        self.refuse(SpliceRegisters(0, 1, keys, values[:, :, :1]), graph, "one shape")
        self.refuse(SpliceRegisters(0, 1, keys * np.nan, values), graph, "finite")
        self.refuse(SpliceRegisterTokens(0, 1, keys[0, 0]), graph, "do not fit a width of 16")
        tokens = random_tokens(vit.spec, 1) * np.inf
        self.refuse(SpliceRegisterTokens(0, 1, tokens), graph, "finite")

    def test_twice(self, graph: gs.Graph, vit: TinyVit) -> None:
        keys, values = random_kv(vit.spec, 1, 2)
        once = run(SpliceRegisters(1, 2, keys, values), graph).graph
        self.refuse(SpliceRegisters(1, 2, keys, values), once, "blocks.1 has registers already")
        other = run(SpliceRegisters(0, 1, keys, values), once)
        assert len(other.log.edits) == 1
        tokens = random_tokens(vit.spec, 1)
        with_tokens = run(SpliceRegisterTokens(1, 2, tokens), graph).graph
        self.refuse(SpliceRegisterTokens(0, 1, tokens), with_tokens, "register tokens already")
        self.refuse(DeleteSinks(0, 1), with_tokens, "already")
        self.refuse(DeleteSinks(0, 1), run(DeleteSinks(1, 1), graph).graph, "already")

    def test_sinks(self, graph: gs.Graph) -> None:
        self.refuse(DeleteSinks(2, 1), graph, "no block 2")
        self.refuse(DeleteSinks(0, 9), graph, "cannot delete 9 of 9 patches")
        self.refuse(DeleteSinks(0, -1), graph, "cannot delete -1")

    def test_a_head_that_needs_every_position(self) -> None:
        graph = canonical_graph(TinyVit(Spec()).model())
        hidden = graph.outputs[1]
        picture = gs.Variable("picture", dtype=np.float32, shape=["batch", 160])
        shape = gs.Constant("flat", np.array([-1, 160], dtype=np.int64))
        graph.nodes.append(gs.Node("Reshape", "decoder", {}, [hidden, shape], [picture]))
        weight = gs.Constant("w", np.ones((160, 2), np.float32))
        decoded = gs.Variable("decoded", dtype=np.float32, shape=["batch", 2])
        graph.nodes.append(gs.Node("MatMul", "decode", {}, [picture, weight], [decoded]))
        graph.outputs.append(decoded)
        self.refuse(DeleteSinks(0, 1), graph, "Reshape 'decoder' needs every position")

    def test_heads_merged_with_the_batch(self) -> None:
        vit = TinyVit(SPELLINGS["merged heads"])
        graph = canonical_graph(vit.model())
        tokens = random_tokens(vit.spec, 1)
        message = r"Reshape 'n\d+_Reshape' needs every position"
        self.refuse(SpliceRegisterTokens(0, 1, tokens), graph, message)
        self.refuse(DeleteSinks(0, 1), graph, message)

    def test_a_mask_on_the_scores(self, graph: gs.Graph, vit: TinyVit) -> None:
        softmax = next(node for node in graph.nodes if node.op == "Softmax")
        mask = gs.Constant("mask", np.tri(10, dtype=np.float32))
        masked = gs.Variable("masked", dtype=np.float32)
        graph.nodes.append(gs.Node("Add", "causal", {}, [softmax.inputs[0], mask], [masked]))
        softmax.inputs[0] = masked
        graph.toposort()
        keys, values = random_kv(vit.spec, 1, 2)
        self.refuse(SpliceRegisters(0, 1, keys, values), graph, "Add 'causal' masks the scores")
        tokens = random_tokens(vit.spec, 1)
        self.refuse(SpliceRegisterTokens(0, 1, tokens), graph, "constant for every token")

    def test_tokens(self, graph: gs.Graph, vit: TinyVit) -> None:
        view = view_encoder(graph)
        with pytest.raises(InputError, match="do not fit a width of 16"):
            capture_registers(view, 0, 1, np.zeros((1, 3), np.float32))
        with pytest.raises(InputError, match="finite"):
            capture_registers(view, 0, 1, np.full((1, 16), np.nan, np.float32))


@pytest.mark.parametrize("name", ["plain", "fused qkv", "gemm", "swiglu"])
def test_flops_equal_a_hand_count(name: str) -> None:
    spec = SPELLINGS[name]
    tokens, width, hidden = spec.tokens, spec.width, spec.hidden
    fc = 3 if spec.activation == "swiglu" else 2
    block = 2 * tokens * width * (4 * width + fc * hidden) + 4 * tokens**2 * width
    graph = canonical_graph(TinyVit(spec).model())
    counted = count_flops(graph)
    assert counted.matmul == spec.depth * block
    assert counted.conv == 2 * spec.grid**2 * width * 3 * spec.patch**2
    keys, values = random_kv(spec, 2, 4)
    spliced = count_flops(run(SpliceRegisters(0, 2, keys, values), graph).graph)
    assert spliced.matmul - counted.matmul == 2 * 4 * tokens * 4 * width


def test_flops_need_shapes() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    node = next(node for node in graph.nodes if node.op == "MatMul")
    node.outputs[0].shape = None
    with pytest.raises(InputError, match="is not known"):
        count_flops(graph)


@pytest.mark.slow
@examples(25)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 6),
    grid=st.integers(2, 4),
    prefix=st.integers(0, 3),
    depth=st.integers(1, 3),
    count=st.integers(1, 7),
    mode=st.sampled_from(["kv", "token", "delete"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_random_encoders_and_places(
    heads: int, head_dim: int, grid: int, prefix: int, depth: int, count: int, mode: str,
    seed: int, data: Any,
) -> None:  # fmt: skip
    spec = Spec(
        width=heads * head_dim, heads=heads, depth=depth, hidden=9, grid=grid, prefix=prefix,
        layer_scale=bool(seed % 2), gemm=bool(seed % 3 == 0), pooling_head=prefix == 0, seed=seed,
    )  # fmt: skip
    vit = TinyVit(spec)
    start = data.draw(st.integers(0, depth - 1))
    end = data.draw(st.integers(start + 1, depth))
    graph = canonical_graph(vit.model())
    if mode == "kv":
        keys, values = random_kv(spec, end - start, count, seed)
        step: Pass = SpliceRegisters(start, end, keys, values)
        plan = Registers(start, end, keys, values)
    elif mode == "token":
        tokens = random_tokens(spec, count, seed)
        step, plan = SpliceRegisterTokens(start, end, tokens), Registers(start, end, tokens=tokens)
    else:
        count = min(count, grid**2 - 1)
        step, plan = DeleteSinks(start, count), Registers(start, sinks=count)
    images = vit.images(2, seed)
    wanted = vit.reference(images, plan)
    for found, truth in zip(run_graph(run(step, graph).graph, images), wanted, strict=True):
        assert np.abs(found - truth).max() <= 2e-4 * max(1.0, float(np.abs(truth).max()))
