"""ONNX Runtime's fused operators apart: what ONNX Runtime itself computes, in ONNX's operators."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.examples import examples
from support.fused_nodes import assert_unfused, draw_array, fused_graph, unfused
from support.running import run_feeds, run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import TinyVit

from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize_graph
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import import_graph
from regcache.passes.raise_opset import raise_opset
from regcache.passes.scalar_function import ACTIVATIONS
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft

SIZES = st.integers(1, 4)
SEEDS = st.integers(0, 99)
FLAGS = st.booleans()
ANY = examples(25)


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@ANY
@given(SIZES, SIZES, SIZES, SEEDS)
def test_activations(batch: int, tokens: int, width: int, seed: int) -> None:
    x, bias = draw_array(seed, batch, tokens, width), draw_array(seed + 1, width)
    assert_unfused("Gelu", {"x": x})
    assert_unfused("BiasGelu", {"x": x, "bias": bias}, ["bias"])
    assert_unfused("FastGelu", {"x": x})
    assert_unfused("FastGelu", {"x": x, "bias": bias}, ["bias"])
    assert_unfused("QuickGelu", {"x": x})
    for alpha in (1.0, 1.25):
        assert_unfused("QuickGelu", {"x": x}, alpha=alpha)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scales", [1, 5])
def test_integer_products(scales: int, bias: bool) -> None:
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any] | None] = {
        "a": random.integers(0, 256, (2, 3, 4)).astype(np.uint8),
        "b": random.integers(-128, 128, (4, 5)).astype(np.int8),
        "a_scale": np.array(0.02, np.float32),
        "b_scale": np.linspace(0.01, 0.03, scales).astype(np.float32),
        "a_zero": np.array(117, np.uint8),
        "b_zero": np.zeros(scales, np.int8),
        "bias": draw_array(1, 5) if bias else None,
    }
    after = assert_unfused("MatMulIntegerToFloat", inputs, list(inputs)[1:])
    assert ops(after) == ["DequantizeLinear"] * 2 + ["MatMul"] + ["Add"] * bias


def test_activations_that_only_a_gpu_has() -> None:
    """ONNX Runtime has no kernel for a CPU: against the formulas of its documentation."""
    x, bias, skip = draw_array(0, 2, 3, 8), draw_array(1, 8), draw_array(2, 2, 3, 8)
    weight = draw_array(3, 8, 5)
    gelu, fast = ACTIVATIONS["gelu"], ACTIVATIONS["gelu_tanh"]
    total = (x + bias).astype(np.float64)
    (found,) = run_feeds(
        unfused(fused_graph("BiasSplitGelu", {"x": x, "b": bias}, ["b"])), {"x": x}
    )
    np.testing.assert_allclose(found, total[..., :4] * gelu(total[..., 4:]), rtol=1e-4, atol=1e-5)
    graph = unfused(fused_graph("BiasAdd", {"x": x, "b": bias, "skip": skip}, ["b"]))
    (found,) = run_feeds(graph, {"x": x, "skip": skip})
    np.testing.assert_allclose(found, total + skip, rtol=1e-5, atol=1e-6)
    for given_bias in (draw_array(4, 5), None):
        inputs = {"x": x, "w": weight, "b": given_bias}
        (found,) = run_feeds(unfused(fused_graph("GemmFastGelu", inputs, ["w", "b"])), {"x": x})
        plain = x.astype(np.float64) @ weight + (0 if given_bias is None else given_bias)
        np.testing.assert_allclose(found, fast(plain), rtol=1e-4, atol=1e-5)


OUTPUTS = (("y", 3), ("", 0), ("", 0), ("total", 3))


@ANY
@given(SIZES, SIZES, st.integers(2, 9), FLAGS, FLAGS, FLAGS, FLAGS, SEEDS)
def test_skip_layer_norms(
    batch: int,
    tokens: int,
    width: int,
    beta: bool,
    bias: bool,
    total: bool,
    narrow: bool,
    seed: int,
) -> None:
    inputs = {
        "x": draw_array(seed, batch, tokens, width),
        "skip": draw_array(seed + 1, 1 if narrow else batch, tokens, width),
        "gamma": draw_array(seed + 2, width),
        "beta": draw_array(seed + 3, width) if beta else None,
        "bias": draw_array(seed + 4, width) if bias else None,
    }
    outputs = OUTPUTS if total else OUTPUTS[:1]
    weights = ["gamma", "beta", "bias"]
    # An epsilon that shows, also where two channels are nearly alike.
    after = assert_unfused("SkipLayerNormalization", inputs, weights, outputs=outputs, epsilon=1e-2)
    assert ops(after) == ["Add"] * (1 + bias) + ["LayerNormalization"]
    del inputs["beta"]
    after = assert_unfused(
        "SkipSimplifiedLayerNormalization", inputs, weights[::2], outputs=outputs, epsilon=1e-2
    )
    assert ops(after) == ["Add"] * (1 + bias) + ["RMSNormalization"]
    inputs = {"x": inputs["x"], "gamma": inputs["gamma"]}
    after = assert_unfused(
        "SimplifiedLayerNormalization", inputs, ["gamma"], domain="", axis=-1, epsilon=1e-2
    )
    assert ops(after) == ["RMSNormalization"]


def test_default_epsilons() -> None:
    x = np.full((1, 1, 4), 1e-4, np.float32) * [1, -1, 2, 3]
    inputs = {
        "x": x.astype(np.float32),
        "skip": np.zeros_like(x, np.float32),
        "gamma": np.ones(4, np.float32),
    }
    assert_unfused("SkipLayerNormalization", inputs, ["gamma"])
    assert_unfused("SkipSimplifiedLayerNormalization", inputs, ["gamma"])
    del inputs["skip"]
    assert_unfused("SimplifiedLayerNormalization", inputs, ["gamma"], domain="")


@pytest.mark.parametrize("side", ["x", "skip"])
def test_a_bias_goes_to_the_linear_that_it_came_from(side: str) -> None:
    graph = fused_graph(
        "SkipLayerNormalization",
        {"x": draw_array(0, 2, 3, 4), "skip": draw_array(1, 2, 3, 4), "gamma": draw_array(2, 4),
         "beta": draw_array(3, 4), "bias": draw_array(4, 4)},
        ["gamma", "beta", "bias"],
    )  # fmt: skip
    (node,) = graph.nodes
    slot = ["x", "skip"].index(side)
    product = gs.Variable("product", np.float32)
    weight = gs.Constant("weight", draw_array(5, 4, 4))
    graph.nodes.append(gs.Node("MatMul", "linear", {}, [node.inputs[slot], weight], [product]))
    node.inputs[slot] = product
    after = run(UnfuseMicrosoft(), graph.toposort()).graph
    (linear,) = [node for node in after.nodes if node.op == "MatMul"]
    (add,) = linear.outputs[0].outputs
    assert (add.op, add.inputs[1].name) == ("Add", "bias")


def test_the_factor_of_a_product_goes_where_it_came_from() -> None:
    """Into a constant weight; onto a Mul before, which may be half of a Gelu."""
    inputs = {"a": draw_array(0, 2, 3, 4), "b": draw_array(1, 4, 5)}
    graph = fused_graph("FusedMatMul", inputs, ["b"], alpha=0.5)
    (matmul,) = unfused(graph).nodes
    np.testing.assert_array_equal(matmul.inputs[1].values, inputs["b"] * np.float32(0.5))
    (node,) = graph.nodes
    product = gs.Variable("product", np.float32)
    graph.nodes.append(gs.Node("Mul", "before", {}, [node.inputs[0]] * 2, [product]))
    node.inputs[0] = product
    assert ops(unfused(graph.toposort())) == ["Mul", "Mul", "MatMul"]


@pytest.mark.parametrize("name", ["torchscript", "tanh", "quick gelu", "swiglu", "rms norm"])
def test_what_onnx_runtime_saves(name: str, tmp_path: Path) -> None:
    vit = TinyVit(SPELLINGS[name])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    providers = ["CPUExecutionProvider"]
    onnxruntime.InferenceSession(vit.model().SerializeToString(), options, providers=providers)
    saved = import_graph(raise_opset(onnx.load(tmp_path / "saved.onnx")))
    result = run(UnfuseMicrosoft(), saved)
    assert result.changed
    graph = canonicalize_graph(result.graph)
    assert [linear.name for linear in view_encoder(graph).linears] == [
        linear.name for linear in view_encoder(canonical_graph(vit.model())).linears
    ]
    images = vit.images(2)
    for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@ANY
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, FLAGS, FLAGS, FLAGS, SEEDS)
def test_fused_matmul(
    batch: list[int], m: int, k: int, n: int, left: bool, right: bool, constant: bool, seed: int
) -> None:
    a = draw_array(seed, *batch, *((k, m) if left else (m, k)))
    b = draw_array(seed + 1, *batch, *((n, k) if right else (k, n)))
    after = assert_unfused(
        "FusedMatMul", {"a": a, "b": b}, ["b"] if constant else [], outputs=[("y", a.ndim)],
        transA=int(left), transB=int(right), alpha=0.25,
    )  # fmt: skip
    assert ops(after).count("Transpose") == left + (right and not constant)
    assert_unfused(
        "FusedMatMul",
        {"a": a, "b": b},
        outputs=[("y", a.ndim)],
        transA=int(left),
        transB=int(right),
    )


@ANY
@given(SIZES, SIZES, SIZES, SIZES, SIZES, FLAGS, FLAGS, FLAGS, FLAGS, SEEDS)
def test_fused_matmul_with_the_batch_inside(
    one: int, two: int, m: int, k: int, n: int, left: bool, right: bool, a_in: bool, b_in: bool,
    seed: int,
) -> None:  # fmt: skip
    a, b = ((k, m) if left else (m, k)), ((n, k) if right else (k, n))
    shape_a = (a[0], one, two, a[1]) if a_in else (one, two, *a)
    shape_b = (b[0], one, two, b[1]) if b_in else (one, two, *b)
    assert_unfused(
        "FusedMatMul", {"a": draw_array(seed, *shape_a), "b": draw_array(seed + 1, *shape_b)},
        outputs=[("y", 4)], transA=int(left), transB=int(right), transBatchA=int(a_in),
        transBatchB=int(b_in),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "params"),
    [
        ("Relu", {}), ("Tanh", {}), ("Sigmoid", {}), ("LeakyRelu", {"activation_alpha": 0.2}),
        ("Elu", {"activation_alpha": 0.7}), ("Softplus", {}),
        ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
    ],
)  # fmt: skip
def test_fused_gemm(activation: str, params: dict[str, float]) -> None:
    inputs = {"a": draw_array(0, 4, 3), "b": draw_array(1, 5, 4), "c": draw_array(2, 5)}
    after = assert_unfused(
        "FusedGemm", inputs, ["b", "c"], outputs=[("y", 2)], activation=activation, transA=1,
        transB=1, alpha=0.5, beta=2.0, **params,
    )  # fmt: skip
    assert ops(after) == ["Gemm", activation]


@pytest.mark.parametrize(
    ("activation", "params"),
    [("Relu", []), ("Tanh", []), ("LeakyRelu", [0.2]), ("Clip", [-0.1, 0.4]),
     ("HardSigmoid", [0.3, 0.4]), ("Sigmoid", [])],
)  # fmt: skip
@pytest.mark.parametrize("skip", [False, True])
def test_fused_conv(activation: str, params: list[float], skip: bool) -> None:
    inputs = {
        "x": draw_array(0, 2, 3, 6, 6),
        "w": draw_array(1, 4, 3, 2, 2),
        "b": draw_array(2, 4),
        "z": draw_array(3, 2, 4, 3, 3) if skip else None,
    }
    given_params: dict[str, Any] = {"activation_params": params} if params else {}
    after = assert_unfused(
        "FusedConv", inputs, ["w", "b"], outputs=[("y", 4)], activation=activation,
        kernel_shape=[2, 2], strides=[2, 2], **given_params,
    )  # fmt: skip
    assert ops(after) == ["Conv", "Add", activation] if skip else ["Conv", activation]


def test_conv_with_channels_last() -> None:
    """ONNX Runtime has no kernel for a CPU: against Conv on what was transposed beforehand."""
    x, w, b = draw_array(0, 2, 6, 7, 3), draw_array(1, 4, 2, 3, 3), draw_array(2, 4)
    attributes: dict[str, Any] = {"strides": [2, 1], "kernel_shape": [2, 3], "pads": [0, 1, 0, 1]}
    inputs = {"x": x, "w": w, "b": b}
    graph = unfused(fused_graph("NhwcConv", inputs, ["w", "b"], outputs=[("y", 4)], **attributes))
    (found,) = run_feeds(graph, {"x": x})
    channels_first = {"x": x.transpose(0, 3, 1, 2), "w": w.transpose(0, 3, 1, 2), "b": b}
    plain = fused_graph(
        "Conv", channels_first, ["w", "b"], outputs=[("y", 4)], domain="", **attributes
    )
    (wanted,) = run_feeds(plain, {"x": np.ascontiguousarray(channels_first["x"])})
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def refusal(graph: gs.Graph) -> str:
    with pytest.raises(InputError) as error:
        run(UnfuseMicrosoft(), graph)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_known_is_named() -> None:
    x = draw_array(0, 2, 3, 4)
    advice = (
        "export without ONNX Runtime's transformer optimiser, or bring the file as it was before"
    )
    found = refusal(fused_graph("GridSample", {"x": x, "g": x}))
    assert found == f"com.microsoft GridSample 'fused' cannot be unfused: {advice}"
    found = refusal(fused_graph("Gelu", {"x": x}, domain="somebody.else"))
    advice = "export it with ONNX's own operators"
    assert found == f"somebody.else Gelu 'fused' is no operator of ONNX: {advice}"
    activation = fused_graph("FusedGemm", {"x": x[0], "w": x[1].T}, activation="Softmax")
    assert "(its activation is Softmax)" in refusal(activation)


def test_a_mean_that_is_read_is_refused() -> None:
    x, gamma = draw_array(0, 2, 3, 4), draw_array(1, 4)
    inputs = {"x": x, "skip": x, "gamma": gamma}
    graph = fused_graph(
        "SkipLayerNormalization", inputs, ["gamma"], outputs=[("y", 3), ("mean", 3)]
    )
    assert "(its output mean is read)" in refusal(graph)


def test_a_node_without_a_name_is_named_after_what_it_makes() -> None:
    graph = fused_graph("Gelu", {"x": draw_array(0, 2, 3, 4)})
    graph.nodes[0].name = ""
    assert [edit.site for edit in run(UnfuseMicrosoft(), graph).log.edits] == ["y"]


def test_lower_opsets_are_refused() -> None:
    graph = fused_graph("Gelu", {"x": draw_array(0, 2, 3, 4)})
    graph.opset = 17
    assert refusal(graph) == "unfuse_microsoft needs opset 20, the graph has 17"
