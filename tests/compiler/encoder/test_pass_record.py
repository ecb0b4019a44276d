"""What the compiler says of what passes skip: all in the manifest, what costs speed to the user."""

import io
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from rich.console import Console
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.encoder.outside_blocks import outside_blocks
from regcache.compiler.encoder.pass_record import PassRecord, pass_records, tell_passes
from regcache.compiler.reporter import Reporter
from regcache.passes.base import Edit, Log, PassRun, Skip
from regcache.passes.canonicalize import canonicalize_logged
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.quantized_products import quantized_products
from regcache.passes.raise_opset import raise_opset

SLOW = "TensorRT computes it in float"


@pytest.mark.parametrize(
    ("skips", "lines"),
    [
        ([Skip("a", "no")], []),
        ([Skip("a", "no", SLOW)], [f"p left a alone: no; {SLOW}"]),
        ([Skip(name, "no", SLOW) for name in "abc"], [f"p left a and 2 more alone: no; {SLOW}"]),
        (
            [
                Skip("a", "no", SLOW),
                Skip("b", "never", SLOW),
                Skip("c", "no"),
                Skip("d", "no", "x"),
            ],
            [f"p left a and 1 more alone: no and the like; {SLOW}", "p left d alone: no; x"],
        ),
    ],
)
def test_one_line_for_each_way_to_be_slower(skips: list[Skip], lines: list[str]) -> None:
    (record,) = pass_records([PassRun("p", Log((Edit("z", "done"),), tuple(skips)))])
    assert (record.name, record.edits, record.slower) == ("p", 1, lines)
    assert record.skips == [f"{skip.site}: {skip.reason}" for skip in skips]
    said = io.StringIO()
    reporter = Reporter(Console(file=said, soft_wrap=True, highlight=False))
    tell_passes([record, PassRecord(name="q", edits=0, skips=["b: why"])], reporter)
    assert said.getvalue().splitlines() == [f"warning: {line}" for line in lines]


def test_what_canonical_passes_did_is_kept() -> None:
    model = TinyVit(Spec(gemm=True, gelu="half_last", layer_norm="pow", opset=17)).model()
    graph, ran = canonicalize_logged(import_graph(raise_opset(model)))
    edits = {one.name: len(one.log.edits) for one in ran}
    assert edits["split_gemm"] == len(view_encoder(graph).linears)
    assert (edits["fuse_gelu"], edits["fuse_layer_norm"]) == (2, 5)


def test_much_work_outside_the_blocks_is_said() -> None:
    """A patch convolution is much of one narrow block's work, and little of eight wider ones'."""
    spec = Spec(width=48, depth=8, hidden=192, patch=2)
    assert outside_blocks(view_encoder(canonical_graph(TinyVit(spec).model()))) == []
    view = view_encoder(canonical_graph(TinyVit(Spec(depth=1, patch=8)).model()))
    (record,) = outside_blocks(view)
    conv, blocks = 9 * 16 * 3 * 8 * 8, 10 * (4 * 16 * 16 + 2 * 16 * 32)
    (line,) = record.slower
    assert line.startswith(f"{conv / (conv + blocks):.0%} of the work with weights lies outside")
    assert "in float: Conv " in line
    assert len(record.skips) == 1
    longer = gs.Constant("head", np.ones((16, 2000), np.float32))
    output = gs.Variable("scores", np.float32)
    pooled = view.graph.outputs[0]
    view.graph.nodes.append(gs.Node("MatMul", "head", {}, [pooled, longer], [output]))
    output.shape = ["batch", 2000]
    (record,) = outside_blocks(view_encoder(view.graph))
    assert record.slower[0].endswith("in float: MatMul head and 1 more")


def test_quantized_products_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    graph = canonical_graph(TinyVit(Spec()).model())
    save_graph(graph, path)
    assert quantized_products(path) == 0
    save_graph(quantized(graph), path)
    assert quantized_products(path) == len(view_encoder(graph).sites)
