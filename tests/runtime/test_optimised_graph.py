"""Which linears ONNX Runtime computes in integers, however they are spelled."""

import contextlib
from pathlib import Path

import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.scales import linear_scales
from support.small_models import pooling_encoder
from support.spellings import SPELLINGS
from support.tiny_vit import TinyVit

from regcache.passes.affine import IntegerType
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops

# Where q, k and v share a signed input, ONNX Runtime leaves them in float on x86.
SIGNED = ("fused qkv", "int8", "int8")
UNSIGNED = [(name, "uint8", "int8") for name in ("plain", "swiglu", "gemm, dynamic")]


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype"), [*UNSIGNED, ("plain", "uint8", "uint8"), SIGNED]
)
def test_every_quantized_linear_runs_on_integers(
    name: str, dtype: IntegerType, weight_dtype: IntegerType
) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    linears = view_encoder(graph).linears
    quantized = run(QuantizeLinears(linear_scales(graph, dtype), weight_dtype), graph).graph
    ops, floats = (
        optimised_ops(gs.export_onnx(item).SerializeToString(), threads=1)
        for item in (quantized, graph)
    )
    assert integer_matmuls(ops) == len(linears)
    assert list(ops.values()) == sorted(ops.values(), reverse=True)
    assert integer_matmuls(floats) == 0


LINEAR = """<ir_version: 8, opset_import: ["" : 17]> linear (float[n, 16] x) => (float[n, 4] y)
<float s = {{0.1}}, uint8 z = {{5}}, int8[16, 4] w = {{{weights}}}, int8[4] wz = {{0, 0, 0, 0}},
 float[4] ws = {{1, 2, 3, 4}}, int32[4] b = {{1, 2, 3, 4}}, int32[4] bz = {{0, 0, 0, 0}}>
{{ {nodes} }}"""
MATRIX = "m = DequantizeLinear <axis = 1> (w, ws, wz)"
ROUNDED = f"q = QuantizeLinear (x, s, z) r = DequantizeLinear (q, s, z) {MATRIX}"
GEMM = f"{ROUNDED} d = DequantizeLinear <axis = 0> (b, ws, bz) y = Gemm (r, m, d)"
CODES = f"{ROUNDED} p = MatMul (r, m) c = QuantizeLinear (p, s, z)"
SUMS = "q, t, u = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, u) f = Cast <to = 1> (i)"
DYNAMIC = f"{SUMS} a = Mul (t, s) y = Mul (f, a)"
BRANCH = f"inner () => (float[n, 4] y) {{ {DYNAMIC} }}"
BRANCHES = f"then_branch = {BRANCH}, else_branch = {BRANCH}"
CHOICE = f"k = ReduceSum <keepdims = 0> (x) o = Cast <to = 9> (k) y = If (o) <{BRANCHES}>"


def linear(nodes: str) -> onnx.ModelProto:
    """x [n, 16] -> y [n, 4]."""
    weights = ", ".join(map(str, range(-32, 32)))
    return onnx.parser.parse_model(LINEAR.format(weights=weights, nodes=nodes))


@pytest.mark.parametrize(
    ("nodes", "op", "count"),
    [
        (GEMM, "QGemm", 1),
        (f"{CODES} y = DequantizeLinear (c, s, z)", "QLinearMatMul", 1),
        (DYNAMIC, "DynamicQuantizeMatMul", 1),
        (f"{SUMS} y = Neg (f)", "MatMulInteger", 1),
        (CHOICE, "DynamicQuantizeMatMul", 2),
    ],
)
def test_integer_linears_of_other_spellings_count(nodes: str, op: str, count: int) -> None:
    """Those in branches too."""
    ops = optimised_ops(linear(nodes).SerializeToString(), threads=1)
    assert ops[op] == integer_matmuls(ops) == count


def test_a_linear_with_integer_weights_alone_does_not() -> None:
    model = linear(f"{MATRIX} y = MatMul (x, m)").SerializeToString()
    assert integer_matmuls(optimised_ops(model, threads=1)) == 0


def test_weights_in_a_file_of_their_own_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = linear(GEMM)
    onnx.save_model(model, path, save_as_external_data=True, location="data", size_threshold=0)
    before = {file.name for file in tmp_path.iterdir()}
    assert integer_matmuls(optimised_ops(path)) == 1
    assert {file.name for file in tmp_path.iterdir()} == before


def test_op_counts_report_what_is_wrong_in_one_silent_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"none\.onnx: ONNX Runtime: .*doesn't exist"):
        optimised_ops(tmp_path / "none.onnx")
    gone = str(tmp_path / "gone")
    nowhere = contextlib.nullcontext(Path(gone))
    monkeypatch.setattr("regcache.runtime.optimised_graph.temporary_folder", lambda: nowhere)
    with pytest.raises(InputError, match=f"the model in memory: .* be written to {gone}") as caught:
        optimised_ops(pooling_encoder(), threads=1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
