"""What becomes int8 by predicted time, on encoders of real sizes told by their shapes."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from support.canonical import canonical_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.job.effort import Preference
from regcache.compiler.job.options import AttentionChoice, CompileOptions
from regcache.compiler.job.targets import Precision, TargetName
from regcache.compiler.quantization.fastest import (
    BATCHES,
    TimeModel,
    fastest_sites,
    gpus_for,
    keep_dear_float,
    predicted_half,
)
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.runtime.block_kernels import BlockFormats, BlockShape, Front
from regcache.runtime.gpu_rates import GPUS

DEPTH = 2
SIZES = {"small": (257, 384), "base": (197, 768), "large": (257, 1024), "long": (1025, 768)}


@pytest.fixture(scope="module")
def view() -> EncoderView:
    return view_encoder(canonical_graph(TinyVit(Spec(depth=DEPTH)).model()))


def options(**given: Any) -> CompileOptions:
    fields: dict[str, Any] = {
        "target": TargetName.TENSORRT_RTX,
        "prefer": Preference.FASTEST,
    } | given
    return CompileOptions(source="a.onnx", images="photos", **fields)


def model(view: EncoderView, size: str, **given: Any) -> TimeModel:
    """The model of blocks of a real size."""
    tokens, width = SIZES[size]
    shape = BlockShape(tokens, tokens, width, width, 4 * width, 4 * width)
    front = Front(224 * 224, tokens - 1, 588, width)
    found = TimeModel.of(view, options(**given))
    assert found is not None
    return replace(found, front=front, shapes=(shape,) * DEPTH)


def roles(names: tuple[str, ...]) -> set[str]:
    return {name.split(".", 2)[2] for name in names}


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_never_predicted_slower_than_float16(view: EncoderView, size: str, gpu: str) -> None:
    told = model(view, size, gpu=gpu, target=TargetName.TENSORRT)
    times = told.times(told.formats(fastest_sites(told, view.sites)))
    assert [(time.gpu, time.batch) for time in times] == [(gpu, batch) for batch in BATCHES]
    assert all(time.ratio is not None and time.ratio <= 1 for time in times)


def test_nothing_else_is_faster(view: EncoderView) -> None:
    """By trying every choice of sites, each for all blocks, on the GPU that is asked for."""
    told = model(view, "base", gpu="RTX 4090")
    chosen = roles(fastest_sites(told, view.sites))

    def geometric_mean(some: set[str]) -> float:
        names = [site.name for site in view.sites if site.name.split(".", 2)[2] in some]
        found = 1.0
        for time in told.times(told.formats(names)):
            assert time.ratio is not None
            found *= time.ratio
        return found

    every = ["q+k+v", "out", "fc1", "fc2"]
    means = {
        frozenset(name for name, kept in zip(every, choice, strict=True) if kept): geometric_mean(
            {name for name, kept in zip(every, choice, strict=True) if kept}
        )
        for choice in product((True, False), repeat=len(every))
    }
    assert means[frozenset(chosen)] == min(means.values()) < 0.5


def test_the_least_favourable_gpu_decides_where_none_is_named(view: EncoderView) -> None:
    told = model(view, "base")
    assert [gpu.name for gpu in told.gpus] == ["L4", "A10", "RTX 4090", "RTX 5090"]
    chosen = fastest_sites(told, view.sites)
    alone = model(view, "base", gpu="L4")
    assert chosen == fastest_sites(alone, view.sites)
    assert roles(chosen) < roles(fastest_sites(model(view, "base", gpu="RTX 5090"), view.sites))
    assert all((time.ratio or 2) <= 1 for time in told.times(told.formats(chosen)))


def test_a_ratio_is_to_float16_on_the_same_gpu(view: EncoderView) -> None:
    told = model(view, "large", gpu="A10")
    names = [site.name for site in view.sites]
    every, none = told.times(told.formats(names)), told.times([BlockFormats()] * DEPTH)
    for one, other in zip(every, none, strict=True):
        assert one.ratio == pytest.approx(one.total_ms / other.total_ms, abs=1e-4)
        assert other.ratio == 1
    assert every[-1].arithmetic_ms < 0.6 * none[-1].arithmetic_ms


def test_what_is_dear_for_the_time_it_saves_stays_float(view: EncoderView) -> None:
    told = model(view, "large", gpu="RTX 4090")
    fast = fastest_sites(told, view.sites)
    assert len(fast) == len(view.sites)
    even = dict.fromkeys(fast, 1e-4)
    assert keep_dear_float(told, view.sites, even) == fast
    worst = "blocks.1.fc2"
    kept = keep_dear_float(told, view.sites, even | {worst: 0.05})
    assert set(fast) - set(kept) == {worst}
    assert keep_dear_float(told, view.sites, {}) == fast


def test_what_saves_no_time_is_left_in_float16_and_said(view: EncoderView) -> None:
    """A tiny encoder is nothing but launches, and 8 bits need more of them."""
    for given in ({"gpu": "A10"}, {"precision": Precision.FP8}):
        told = TimeModel.of(view, options(**given))
        assert told is not None
        assert fastest_sites(told, view.sites) == ()
        assert keep_dear_float(told, view.sites, dict.fromkeys(("blocks.0.fc1",), 1.0)) == ()
        every = told.times(told.formats([site.name for site in view.sites]))
        assert all(time.ratio is not None and time.ratio > 1 for time in every)
    assert predicted_half(options(gpu="A10"), view) == (
        "int8 is predicted to save no time on A10: FP16 throughout"
    )
    assert predicted_half(options(prefer=None), view) is None


def test_gpus_and_what_they_multiply() -> None:
    every = [gpu.name for gpu in gpus_for(options(target=TargetName.TENSORRT))]
    assert every == [gpu.name for gpu in GPUS]
    fp8 = gpus_for(options(precision=Precision.FP8))
    assert [gpu.name for gpu in fp8] == ["L4", "RTX 4090", "RTX 5090"]
    with pytest.raises(InputError, match="--gpu A10: multiplies no FP8"):
        gpus_for(options(precision=Precision.FP8, gpu="A10"))
    with pytest.raises(InputError, match="no GPU 'RTX 1080'"):
        gpus_for(options(gpu="RTX 1080"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"target": TargetName.ORT_CPU}, "--prefer fastest is for int8 and fp8 on TensorRT"),
        ({"precision": Precision.FP16}, "--prefer fastest is for int8 and fp8 on TensorRT"),
        ({"target": TargetName.OPENVINO, "prefer": None, "gpu": "L4"}, "--gpu is for int8 and fp8"),
        ({"int8_share": 0.5}, "--prefer fastest and --int8-share do not go together"),
        ({"attention": AttentionChoice.INT8}, "--prefer fastest leaves attention's products"),
    ],
)
def test_options_that_exclude_one_another(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        options(**given)


def test_an_open_number_of_tokens_cannot_be_predicted() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    view = view_encoder(graph)
    view.blocks[0].input.shape = ["batch", "tokens", 16]
    with pytest.raises(InputError, match=r"a\.onnx: --prefer fastest needs a fixed number"):
        predicted_half(options(), view)


def test_fp8_is_at_most_as_fast_as_int8_on_every_gpu() -> None:
    """So that int8 is what `fastest` takes unless FP8 is asked for."""
    for gpu in GPUS:
        assert gpu.operations.get("FP8", 0) <= gpu.operations["INT8"]
