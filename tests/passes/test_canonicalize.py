"""Canonical graphs: the same numbers as a float64 reference, whatever the exporter's spelling."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.canonicalize import PASSES, canonicalize
from regcache.passes.check import check_and_infer
from regcache.passes.errors import InputError
from regcache.passes.fuse_gelu import FuseGelu
from regcache.passes.fuse_layer_norm import FuseLayerNorm
from regcache.passes.onnx_file import import_graph
from regcache.passes.raise_opset import raise_opset
from regcache.passes.resolve_shapes import ResolveShapes
from regcache.passes.split_gemm import SplitGemm


def ready(spec: Spec) -> gs.Graph:
    """The graph as imported, with shapes, before any pass."""
    graph = import_graph(raise_opset(TinyVit(spec).model()))
    check_and_infer(graph)
    return graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_canonical_graph_computes_the_reference(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonicalize(vit.model())
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    for batch in (1, 3):
        images = vit.images(batch)
        for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
def test_canonical_form_has_no_decomposed_nodes(name: str) -> None:
    spec = SPELLINGS[name]
    found = ops(canonicalize(TinyVit(spec).model()))
    norm = "RMSNormalization" if spec.layer_norm == "rms" else "LayerNormalization"
    assert found[norm] == 2 * spec.depth + 1
    assert found["Gelu"] == (spec.depth if spec.activation.startswith("gelu") else 0)
    assert not found.keys() & {"Gemm", "Erf", "Tanh", "ReduceMean", "Sqrt", "Constant"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_canonicalizing_twice_changes_nothing(name: str) -> None:
    once = canonicalize(TinyVit(SPELLINGS[name]).model())
    model = gs.export_onnx(once)
    for step in PASSES:
        result = run(step, once)
        assert not result.changed, (step.name, result.log.edits)
        assert result.graph is once
    assert gs.export_onnx(once).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("name", ["torchscript", "gemm", "tanh", "sdpa", "rms norm", "einsum"])
def test_nodes_without_names(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    model = vit.model()
    for node in model.graph.node:
        node.name = ""
    graph = canonicalize(model)
    images = vit.images(2)
    for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelling", ["pow", "mul"])
def test_fuse_layer_norm_counts(spelling: str) -> None:
    graph = ready(Spec(layer_norm=spelling, depth=3))  # type: ignore[arg-type]
    before = ops(graph)
    result = run(FuseLayerNorm(), graph)
    after = ops(result.graph)
    assert len(result.log.edits) == 7
    assert before["LayerNormalization"] == 0
    assert after["LayerNormalization"] == 7
    gone = Counter({"ReduceMean": 14, "Sub": 7, "Sqrt": 7, "Div": 7, "Add": 14})
    gone["Pow" if spelling == "pow" else "Mul"] += 7
    gone["Mul"] += 7  # the scale
    assert before - after == gone


def test_layer_norm_over_another_axis_is_left_alone() -> None:
    graph = ready(Spec(layer_norm="pow"))
    for node in graph.nodes:
        if node.op == "ReduceMean":
            node.inputs[1] = gs.Constant(f"{node.name}_axis", np.array([1], dtype=np.int64))
    result = run(FuseLayerNorm(), graph)
    assert not result.changed


@pytest.mark.parametrize(
    ("activation", "spelling"),
    list(itertools.product(["gelu", "gelu_tanh"], ["half_last", "half_first"])),
)
def test_fuse_gelu_counts(activation: str, spelling: str) -> None:
    spec = Spec(activation=activation, gelu=spelling, depth=3, opset=20)  # type: ignore[arg-type]
    result = run(FuseGelu(), ready(spec))
    assert len(result.log.edits) == 3
    assert ops(result.graph)["Gelu"] == 3
    kinds = {node.attrs["approximate"] for node in result.graph.nodes if node.op == "Gelu"}
    assert kinds == {"tanh" if activation == "gelu_tanh" else "none"}


@pytest.mark.parametrize("constant", ["const_1.0", "const_0.5", f"const_{2**0.5!r}"])
def test_what_is_nearly_a_gelu_is_left_alone(constant: str) -> None:
    graph = ready(Spec(gelu="half_last"))
    tensor = graph.tensors()[constant]
    tensor.values = np.array(float(tensor.values) * 1.01, dtype=np.float32)
    result = run(FuseGelu(), graph)
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == ["Erf is not part of a GELU"] * 2


def test_resolve_shapes_removes_the_arithmetic() -> None:
    graph = ready(Spec(dynamic_shapes=True, opset=20))
    result = run(ResolveShapes(), graph)
    assert len(result.log.edits) == ops(graph)["Reshape"]
    assert ops(result.graph)["Shape"] == 1  # the class token's Expand
    again = run(ResolveShapes(), result.graph)
    assert not again.changed


def test_split_gemm_counts_and_refusals() -> None:
    graph = ready(Spec(gemm=True, depth=1))
    first, second, third, *_ = (node for node in graph.nodes if node.op == "Gemm")
    first.attrs["transA"] = 1
    for node in (second, third):
        node.inputs[2] = gs.Variable(f"{node.name}/bias", np.float32, [16])
        graph.inputs.append(node.inputs[2])
    second.attrs["beta"] = 0.5
    log = SplitGemm().rewrite(graph)
    assert len(log.edits) == 4
    assert [(s.site, s.reason) for s in log.skips] == [
        (first.name, "transA is set"),
        (second.name, "beta is not 1 and the bias not constant"),
    ]
    assert ops(graph)["Gemm"] == 2


def test_split_gemm_takes_alpha_and_beta_in() -> None:
    vit = TinyVit(Spec(gemm=True, depth=1))
    graph = ready(vit.spec)
    for node, alpha, beta in zip(
        [node for node in graph.nodes if node.op == "Gemm"],
        (2, 1, 0.25, 0.5, 4, 1),
        (1, 0.5, 4, 2, 1, 1),
        strict=True,
    ):
        node.attrs |= {"alpha": float(alpha), "beta": float(beta)}
        node.inputs[1] = gs.Constant(f"{node.name}/w", node.inputs[1].values / np.float32(alpha))
        node.inputs[2] = gs.Constant(f"{node.name}/b", node.inputs[2].values / np.float32(beta))
    result = run(SplitGemm(), graph)
    assert (len(result.log.edits), result.log.skips) == (6, ())
    images = vit.images(2)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_opset_without_conversion_is_refused() -> None:
    model = TinyVit(Spec()).model()
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    with pytest.raises(InputError, match="no standard ONNX operators"):
        raise_opset(model)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = TinyVit(Spec()).model()
    wrong = np.zeros((1, 4, 16), dtype=np.float32)
    for weight in model.graph.initializer:
        if weight.name == "position":
            weight.CopyFrom(onnx.numpy_helper.from_array(wrong, "position"))
    with pytest.raises(InputError, match="shapes do not fit"):
        canonicalize(model)


@pytest.mark.slow
@examples(25)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 9),
    grid=st.integers(1, 4),
    prefix=st.integers(0, 3),
    layer_norm=st.sampled_from(["node", "pow", "mul"]),
    gemm=st.booleans(),
    dynamic=st.booleans(),
    opset=st.sampled_from([17, 18, 20, 21]),
    seed=st.integers(0, 1000),
)
def test_random_encoders_stay_what_they_are(
    heads: int, head_dim: int, grid: int, prefix: int, layer_norm: Any, gemm: bool, dynamic: bool,
    opset: int, seed: int,
) -> None:  # fmt: skip
    spec = Spec(
        width=heads * head_dim, heads=heads, depth=1, hidden=7, grid=grid, prefix=prefix,
        layer_norm=layer_norm, gelu="half_last", gemm=gemm, dynamic_shapes=dynamic, opset=opset,
        pooling_head=prefix == 0, seed=seed,
    )  # fmt: skip
    vit = TinyVit(spec)
    images = vit.images(2, seed)
    for found, wanted in zip(
        run_graph(canonicalize(vit.model()), images), vit.reference(images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
