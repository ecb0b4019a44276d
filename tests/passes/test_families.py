"""Every source family: read as blocks, quantized, and still the encoder it was."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support import zoo
from support.families import EXPECTED, images, view
from support.running import run_graph

from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.rotate_hidden import RotateHidden
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.split_qkv import SplitQkv


def test_every_family_is_listed() -> None:
    assert set(EXPECTED) == set(zoo.FAMILIES)


@pytest.mark.parametrize("name", zoo.family_params())
def test_facts_of_the_encoder(name: str, folder: Path) -> None:
    found = view(name, folder)
    blocks, prefix, heads, activation, linears = EXPECTED[name]
    assert len(found.blocks) == blocks
    assert (found.prefix_tokens, found.heads) == (prefix, heads)
    for block in found.blocks:
        assert block.mlp.activation == activation
        assert tuple(linear.name.rpartition(".")[2] for linear in block.linears) == linears
        biased = [linear.bias_add is not None for linear in block.linears]
        assert all(biased) or name.startswith("dinov3")


@pytest.mark.parametrize("name", zoo.family_params())
def test_quantized_graph_stays_the_encoder(name: str, folder: Path) -> None:
    """Min-max int8 on the very images it runs: near the float output, and valid to the checker."""
    found = view(name, folder)
    batch = images(2)
    sites = tuple(site.tensor.name for site in found.sites)
    original = run_graph(run(Observe(sites), found.graph).graph, batch, optimize=True)
    ranges = zip(sites, original[len(found.graph.outputs) :], strict=True)
    scales = {
        site: Affine.from_range(float(x.min()), float(x.max()), "uint8", symmetric=False)
        for site, x in ranges
    }
    result = run(QuantizeLinears(scales), found.graph)
    assert len(result.log.edits) == len(sites)
    assert not result.log.skips
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    # As written, in float: the test is of the graph, not of this CPU's integer kernels.
    quantized = run_graph(result.graph, batch)
    for before, after in zip(original, quantized, strict=False):
        noise = np.square(before - after).sum() / np.square(before).sum()
        assert 0 < noise < 0.02, name


@pytest.mark.parametrize("name", zoo.family_params())
def test_a_rotated_graph_is_the_same_encoder(name: str, folder: Path) -> None:
    """As TensorRT gets it: packed projections split, the stream and what fc2 reads rotated."""
    found = view(name, folder)
    graph, batch = run(SplitQkv(), found.graph).graph, images(2)
    for step, edits in ((RotateStream(), 1), (RotateHidden(), len(found.blocks))):
        result = run(step, graph)
        assert (len(result.log.edits), result.log.skips) == (edits, ())
        graph = result.graph
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    for before, after in zip(run_graph(found.graph, batch), run_graph(graph, batch), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())
