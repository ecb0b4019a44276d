"""A search in a rotated encoder: tokens, registers and sinks are told as in the one that came."""

from dataclasses import replace
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.number_formats import U8S8
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.candidates import find_candidates
from regcache.compiler.curation.screening import Screen, screened_ranges
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.workbench import HeldStudy, Workbench
from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotated_stream import as_stream
from regcache.passes.rotation_matrix import rotation_of_stream

Floats = NDArray[np.float32]

SPEC = Spec(depth=4)
VIT = TinyVit(SPEC)
SETTINGS = {
    "kv": Setting(candidates=(0, 1), start=1, end=3),
    "kv in all blocks": Setting(candidates=(0, 1), start=0, end=4),
    "token": Setting(candidates=(0, 1), start=1, end=3, mode="token"),
    "token in all blocks": Setting(candidates=(0, 1), start=0, end=4, mode="token"),
    "deletion": Setting(delete_at=1, delete_count=3),
    "deletion at the ends": Setting(delete_at=0, delete_count=3),
    "deletion in the last block": Setting(delete_at=3, delete_count=3),
}


@cache
def graphs() -> tuple[gs.Graph, gs.Graph]:
    plain = canonical_graph(VIT.model())
    return plain, run(RotateStream(seed=3), plain).graph


@cache
def studies() -> tuple[HeldStudy, HeldStudy]:
    images = ReferenceImages.deal(VIT.images(16))
    plain, rotated = (HeldStudy(Study.of(graph, images, Quantizer(U8S8))) for graph in graphs())
    return plain, rotated


def workbenches() -> tuple[Workbench, Workbench]:
    plain, rotated = studies()
    return plain.workbench(), rotated.workbench()


def tokens(count: int) -> Floats:
    shape = (count, SPEC.width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_hidden_states_are_told_as_they_came() -> None:
    plain, rotated = workbenches()
    for index in range(SPEC.depth + 1):
        found = rotated.in_own_channels(rotated.fit[index], index)
        np.testing.assert_allclose(found, plain.fit[index], rtol=1e-4, atol=1e-4)
        assert (found is rotated.fit[index]) == (index == SPEC.depth)
        assert plain.in_own_channels(plain.fit[index], index) is plain.fit[index]
    for one, other in zip(rotated.stream_norms, plain.stream_norms, strict=True):
        assert one.linf.maximum == pytest.approx(other.linf.maximum, rel=1e-4)


@pytest.mark.parametrize("sensitive", [0, SPEC.depth - 1])
def test_candidates_are_the_same(sensitive: int) -> None:
    (wanted, universal), (found, same) = (find_candidates(one, sensitive) for one in workbenches())
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one.block, one.image, one.token) == (other.block, other.image, other.token)
        np.testing.assert_allclose(one.vector, other.vector, rtol=1e-3, atol=1e-4)
    assert same.outliers == universal.outliers


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_to_both_the_same(name: str) -> None:
    """In float, on every output."""
    setting, images = SETTINGS[name], VIT.images(3)
    placed = [
        place_registers(graph, view_encoder(graph), setting, tokens(setting.count))[0]
        for graph in graphs()
    ]
    plain, rotated = (run_graph(graph, images) for graph in placed)
    before = run_graph(graphs()[0], images)
    assert np.abs(plain[0] - before[0]).max() > 1e-2
    for found, wanted in zip(rotated, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_screens_look_at_the_same_registers() -> None:
    """What behind the attention no rotation reaches has the same range in both."""
    plain, rotated = (screened_ranges(held, Screen(tokens(2), 1, 3)) for held in studies())
    for name in ("blocks.1.out", "blocks.2.out", "blocks.2.fc2"):
        assert rotated[name] == pytest.approx(plain[name], rel=1e-3)


def test_registers_are_turned_where_the_stream_is() -> None:
    plain, rotated = graphs()
    matrix = rotation_of_stream(SPEC.width, 3)
    np.testing.assert_array_equal(as_stream(rotated, tokens(3)), tokens(3) @ matrix)
    assert as_stream(plain, tokens(3)) is not None
    np.testing.assert_array_equal(as_stream(plain, tokens(3)), tokens(3))


def test_scales_that_are_known_are_taken() -> None:
    plain, _ = workbenches()
    known = {name: replace(scale, scale=0.5) for name, scale in plain.scales.items()}
    study = Study.of(plain.graph, plain.study.images, Quantizer(U8S8), scales=known)
    assert Workbench(study).scales == known
    assert study.key != plain.study.key
