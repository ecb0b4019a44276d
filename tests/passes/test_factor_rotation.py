"""The product that ends a rotated stream as two small ones: the same numbers, the same matrix."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import TinyVit

from regcache.passes.base import run
from regcache.passes.factor_rotation import FactorRotation
from regcache.passes.find_blocks import view_encoder
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotated_stream import last_product, matrix_in
from regcache.passes.rotation_matrix import kronecker_factors, rotation_of_stream, rotation_sizes


@pytest.mark.parametrize("spelling", ["plain", "fused qkv", "no prefix, pooled"])
def test_two_small_products(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = run(RotateStream(3), canonical_graph(vit.model())).graph
    result = run(FactorRotation(), graph)
    assert [edit.what for edit in result.log.edits] == ["4 parts of 4 channels"]
    assert ops(result.graph) - ops(graph) == {"MatMul": 1, "Reshape": 2}
    images = vit.images(3)
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, graph)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    matrix = matrix_in(gs.export_onnx(result.graph))
    assert matrix is not None
    np.testing.assert_allclose(matrix, rotation_of_stream(16, 3), atol=1e-6)
    assert not run(FactorRotation(), result.graph).changed
    # What comes behind, as `build` of an artifact, reads the same encoder.
    shapes = [view_encoder(one).linear_shapes for one in (graph, result.graph)]
    assert shapes[0] == shapes[1]


def test_a_matrix_without_factors_is_skipped() -> None:
    graph = run(RotateStream(), canonical_graph(TinyVit(SPELLINGS["plain"]).model())).graph
    product = last_product(graph)
    assert product is not None
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0]
    product.inputs[1] = gs.Constant("random", turn.astype(np.float32))
    result = run(FactorRotation(), graph)
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == ["its matrix has no two factors"]


@pytest.mark.parametrize(("width", "size"), [(384, 64), (48, 16), (20, 4), (64, 16)])
def test_the_rotation_has_the_factors_that_it_is_made_of(width: int, size: int) -> None:
    matrix = rotation_of_stream(width, 5)
    factors = kronecker_factors(matrix)
    assert factors is not None
    across, within = factors
    assert (across.shape, within.shape) == ((width // size,) * 2, (size,) * 2)
    np.testing.assert_allclose(np.kron(across, within), matrix, atol=1e-6)
    np.testing.assert_allclose(np.abs(within), size**-0.5, rtol=1e-5)
    for one in (matrix, across, within):
        np.testing.assert_allclose(one.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(one @ one.T, np.eye(len(one)), atol=1e-5)


def test_a_width_without_factors() -> None:
    assert rotation_sizes(6) == []
    matrix = rotation_of_stream(6)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-6)
    assert kronecker_factors(matrix) is None
