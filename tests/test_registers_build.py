"""Graphs with registers, deleted sinks and Q/DQ pairs build with TensorRT-RTX, still in INT8."""

import itertools
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest
from support import zoo
from support.building import assert_builds, int8_products, needs_tensorrt
from support.quantized_graphs import signed_linears
from support.registers import FORMS, with_registers
from support.sample import sample_blocks

from regcache.passes.find_blocks import view_encoder


def check(encoder: gs.Graph, form: str) -> None:
    view = view_encoder(encoder)
    graph = with_registers(view, form)
    if form in ("token", "kv and delete"):
        assert_builds(graph)  # in float; the others are parts of these
    # One product each for qkv, out, fc1 and fc2 of every block.
    assert int8_products(assert_builds(signed_linears(graph))) == 4 * len(view.blocks)


@needs_tensorrt
@pytest.mark.sample
@pytest.mark.xdist_group("sample")
@pytest.mark.parametrize("form", FORMS)
def test_dinov2_builds(form: str, folder: Path) -> None:
    """Two of its blocks, one without and one with."""
    check(sample_blocks(folder, 2), form)


@pytest.mark.torch
@needs_tensorrt
@pytest.mark.xdist_group("clip-b16")
@pytest.mark.parametrize("form", FORMS)
def test_clip_builds(form: str, folder: Path) -> None:
    check(zoo.canonical_family("clip-b16", folder), form)


@pytest.mark.torch
@needs_tensorrt
@pytest.mark.xdist_group("dinov3-s16")
@pytest.mark.parametrize("form", FORMS)
def test_rotary_embeddings_build(form: str, folder: Path) -> None:
    check(zoo.canonical_family("dinov3-s16", folder), form)


@pytest.mark.torch
def test_forms_differ(folder: Path) -> None:
    """What is built is what it is called: the four graphs hold different nodes."""
    view = view_encoder(zoo.canonical_family("dinov2-s14", folder))
    sizes = [len(with_registers(view, form).nodes) for form in FORMS]
    for one, other in itertools.combinations(sizes, 2):
        assert one != other
