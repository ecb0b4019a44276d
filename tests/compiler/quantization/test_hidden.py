"""Which hidden activations are rotated for ONNX Runtime: where it takes enough error away."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.factor_cases import observed, see_halves, with_outliers
from support.tiny_source import RECIPE, photos
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.folds import Folded
from regcache.compiler.calibration.observe import observe
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import TargetName
from regcache.compiler.quantization import hidden
from regcache.compiler.quantization.factors import Standing, choose_equalization
from regcache.compiler.quantization.hidden import choose_hidden, rotation_pays
from regcache.compiler.quantization.rotation import rotate
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.find_blocks import view_encoder
from regcache.passes.rotate_hidden import RotateHidden, hidden_sites, rotated_channels
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images

SPEC, SIZE = Spec(width=32, heads=4, hidden=64, depth=3, grid=4), 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    folder = photos(tmp_path_factory.mktemp("photos") / "all", 12, seed=1)
    return ImageFolder(list_images(folder), RECIPE, 4)


def encoder_of(vit: TinyVit) -> FloatEncoder:
    graph = canonical_graph(vit.model())
    view = view_encoder(graph)
    return FloatEncoder(Path("tiny.onnx"), graph, view, RECIPE, "source", choose_outputs(view))


def context(images: ImageFolder, target: TargetName = TargetName.ORT_CPU) -> Context:
    values = {"source": "tiny.onnx", "images": "photos", "target": target, "int8_share": 0.6}
    options, unwritten = CompileOptions.model_validate(values), Path("unwritten")
    told = Context(options, choose_target(options), images, unwritten, unwritten, Reporter())
    return replace(told, target=options.profile.formats[options.precision])


def errors(graph: gs.Graph, images: ImageFolder, folder: Path, how: Quantizer) -> dict[str, float]:
    """The error at each fc2's input as it is, or with factors that cost a node, each priced."""
    seen = observed(graph, np.concatenate([batch.images for batch in images]), folder)
    price, found = 1 / (1 - how.target.node_gain), {}
    for site in hidden_sites(view_encoder(graph)):
        now = Standing.untouched(site, Folded.of(seen[site.name]), how)
        even = choose_equalization(now, how, free=False)
        found[site.name] = min(now.error, np.inf if even is None else even.error * price)
    return found


@pytest.mark.parametrize("vit", [TinyVit(SPEC), with_outliers(SPEC)], ids=["even", "outliers"])
def test_what_a_rotated_encoder_shows_decides(
    tmp_path: Path, images: ImageFolder, vit: TinyVit
) -> None:
    """The choice is told from rows that are turned; here the graph is, and runs."""
    encoder, told = encoder_of(vit), context(images)
    how = Quantizer.of(told)
    chosen = choose_hidden(told, encoder, SIZE)
    price = 1 / (1 - how.target.node_gain)
    turned = run(RotateHidden(SIZE), encoder.graph).graph
    plain, rotated = (errors(one, images, tmp_path, how) for one in (encoder.graph, turned))
    for name, error in plain.items():
        ratio = rotated[name] * price / error
        if abs(np.log(ratio)) > 0.1:  # other rows may be the sample's largest
            assert (name in chosen) is bool(ratio < 1), ratio
    assert len(chosen) < SPEC.depth


def spikes(every: int, of: slice) -> Folded:
    """Small numbers, and in one row of `every` a large one, in any channel of `of`."""
    halves, random = [], np.random.default_rng(5)
    for _ in range(2):
        rows = random.standard_normal((240, 64)).astype(np.float32)
        channels = random.choice(np.arange(64)[of], len(rows[::every]))
        rows[::every][np.arange(len(channels)), channels] += 60
        halves.append(rows)
    return see_halves(*halves)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (spikes(12, slice(None)), True),  # any channel may be large: no factor holds that
        (spikes(12, slice(5, 6)), False),  # one channel is: a factor costs as much, and helps more
        (see_halves(*np.random.default_rng(3).uniform(-1, 1, (2, 240, 64))), False),
    ],
    ids=["anywhere", "one channel", "nowhere"],
)
def test_rotations_are_for_outliers_that_no_factor_holds(
    images: ImageFolder, seen: Folded, wanted: bool
) -> None:
    site = hidden_sites(encoder_of(TinyVit(SPEC)).view)[1]
    assert rotation_pays(site, seen, Quantizer.of(context(images)), SIZE) is wanted


@pytest.mark.parametrize("target", [TargetName.ORT_CPU, TargetName.TENSORRT])
def test_only_what_was_chosen_is_rotated_for_onnx_runtime(
    images: ImageFolder, target: TargetName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "regcache.compiler.quantization.rotation.choose_hidden",
        lambda *_: frozenset({"blocks.2.fc2"}),
    )
    found = rotate(context(images, target), encoder_of(TinyVit(SPEC)), 0.6)
    rotated = [rotated_channels(block.mlp.fc2) for block in found.view.blocks]
    assert rotated == ([0, 0, SIZE] if target is TargetName.ORT_CPU else [SIZE] * 3)


def test_a_single_image_has_no_other_half_to_judge_by(images: ImageFolder) -> None:
    one = replace(images, paths=images.paths[:1])
    assert choose_hidden(context(one), encoder_of(TinyVit(SPEC)), SIZE) == frozenset()


def test_a_few_images_are_enough(images: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()
    real = observe

    def counted(*args: object, **more: object) -> int:
        read.append(real(*args, **more))  # type: ignore[arg-type]
        return read[-1]

    monkeypatch.setattr(hidden, "observe", counted)
    monkeypatch.setattr(hidden, "_IMAGES", 6)
    choose_hidden(context(images), encoder_of(TinyVit(SPEC)), SIZE)
    assert read == [6]
