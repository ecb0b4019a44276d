"""Hidden units moved to an appended token: as a reference in float64 computes it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.equalizing import random_factors
from support.running import run_graph
from support.tiny_vit import Array, Registers, Spec, TinyVit, activate

from regcache.passes.base import Pass, run, run_all
from regcache.passes.equalize import Equalize
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.move_hidden import MoveHidden
from regcache.passes.rotate_hidden import RotateHidden
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.strip_registers import StripRegisters

UNITS = ((1, 3), (1, 17), (2, 30))
START = 1


class Moving(TinyVit):
    """The reference with an appended zero token, which stands in front, and moved units."""

    def _mlp(self, x: Array, w: dict[str, Array], i: int) -> Array:
        inner = activate(self.spec.activation, x @ w[f"{i}.fc1"] + w[f"{i}.fc1.b"])
        units = [unit for block, unit in UNITS if block == i]
        if units:
            largest = inner[:, 1:, units].max(axis=1)
            inner[..., units] = 0
            inner[:, 0, units] = largest
        return np.asarray(inner @ w[f"{i}.fc2"] + w[f"{i}.fc2.b"])


def moving(**more: Any) -> Moving:
    """An encoder with two units that hold something large on some patches."""
    vit = Moving(Spec(depth=4, **more))
    for block, unit in UNITS:
        vit.weights[f"{block}.fc1"][:, unit] *= 8
        vit.weights[f"{block}.fc2"][unit] *= 3
    return vit


def steps(spec: Spec) -> list[Pass]:
    token = np.zeros((1, spec.width), np.float32)
    return [SpliceRegisterTokens(START, spec.depth, token), MoveHidden(UNITS)]


def reference(vit: Moving, images: NDArray[np.float32]) -> tuple[Array, Array]:
    token = np.zeros((1, vit.spec.width))
    return vit.reference(images, Registers(START, vit.spec.depth, tokens=token))


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tanh": {"activation": "gelu_tanh"},
    "quick": {"activation": "quick_gelu"},
    "relu": {"activation": "relu"},
    "scaled": {"layer_scale": True},
    "packed": {"qkv": "fused"},
    "open sizes": {"dynamic_shapes": True},
    "operator": {"attention": "op4", "opset": 23},
    "pooled": {"pooling_head": True},
    "gemm": {"gemm": True},
    "gemm, scaled": {"gemm": True, "layer_scale": True, "dynamic_shapes": True},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_computes_what_the_reference_does(spec: dict[str, Any]) -> None:
    vit = moving(**spec)
    graph, images = canonical_graph(vit.model()), vit.images(3)
    moved, ran = run_all(steps(vit.spec), graph)
    assert [edit.site for edit in ran[-1].log.edits] == ["blocks.1.fc1", "blocks.2.fc1"]
    for found, wanted in zip(run_graph(moved, images), reference(vit, images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    unmoved = vit.reference(images)[0]
    assert np.abs(run_graph(moved, images)[0] - unmoved).max() > 0.01  # it does something


@pytest.mark.parametrize(
    "before",
    [[RotateHidden(4)], [RotateStream(seed=1)], [RotateStream(seed=1), RotateHidden(16)], "even"],
    ids=["hidden", "stream", "both", "equalized"],
)
def test_rotated_and_equalized_encoders_are_moved_alike(before: list[Pass] | str) -> None:
    vit = moving(layer_scale=True)
    graph, images = canonical_graph(vit.model()), vit.images(2)
    if before == "even":
        before = [Equalize(random_factors(graph))]
    assert isinstance(before, list)
    prepared, _ = run_all(before, graph)
    moved, _ = run_all(steps(vit.spec), prepared)
    for found, wanted in zip(run_graph(moved, images), reference(vit, images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=5e-4, atol=5e-4)


def test_the_encoder_still_reads_as_one_and_its_units_are_silent() -> None:
    vit = moving()
    graph = canonical_graph(vit.model())
    moved, _ = run_all(steps(vit.spec), graph)
    before, after = view_encoder(graph), view_encoder(moved)
    assert before.linear_shapes == after.linear_shapes
    for block, unit in UNITS:
        (fc1,) = after.blocks[block].mlp.fc1
        assert not fc1.weight[:, unit].any()
        assert fc1.bias[unit] == 0
    untouched = {f"blocks.{block}.fc1" for block, _ in UNITS}
    for old, new in zip(before.linears, after.linears, strict=True):
        if old.name not in untouched:
            assert old.weight is new.weight


def test_no_unit_is_no_edit() -> None:
    graph = canonical_graph(moving().model())
    assert not run(MoveHidden(()), graph).changed


@pytest.mark.parametrize(
    ("units", "spec", "reason"),
    [
        (((0, 3),), {}, "no token is appended at block 0"),
        (((3, 3),), {}, "no token is appended at block 3 and the next"),
        (((1, 32),), {}, "block 1 has hidden units 0 to 31"),
        (((1, -1),), {}, "block 1 has hidden units 0 to 31"),
        (((1, 3),), {"activation": "swiglu"}, "the MLP of block 1 is gated"),
    ],
)
def test_what_is_not_understood_is_refused(
    units: tuple[tuple[int, int], ...], spec: dict[str, Any], reason: str
) -> None:
    vit = TinyVit(Spec(depth=4, **spec))
    token, _ = run_all(steps(vit.spec)[:1], canonical_graph(vit.model()))
    with pytest.raises(InputError, match=reason):
        run(MoveHidden(units), token)


def test_without_a_token_twice_and_quantized_it_is_refused() -> None:
    vit = moving()
    graph = canonical_graph(vit.model())
    with pytest.raises(InputError, match="no token is appended"):
        run(MoveHidden(UNITS), graph)
    moved, _ = run_all(steps(vit.spec), graph)
    with pytest.raises(InputError, match=r"some are moved already|no token is appended"):
        run(MoveHidden(UNITS), moved)
    with pytest.raises(InputError, match="moved"):
        run(StripRegisters(), moved)
