"""Every family: its ONNX against PyTorch, at several batch sizes, and the form of its graph."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from support import zoo, zoo_models

from regcache.passes.errors import InputError

BATCHES = (1, 2, 3)
# Ops of graphs that depend on the image's size, on data, or on attention masks.
UNWANTED = {"Resize", "Shape", "Range", "If", "Loop", "Expand", "Where", "IsNaN", "Cast"}


def images(batch: int, side: int = zoo.SIDE) -> NDArray[np.float32]:
    shape = (batch, 3, side, side)
    return np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)


def run_onnx(path: Path, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {"pixel_values": batch})
    return outputs


def op_counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("name", zoo.family_params())
def test_onnx_equals_pytorch_at_every_batch_size(name: str, folder: Path) -> None:
    exported = zoo.export_family(name, folder)
    reference = exported.source.reference(resolution=zoo.SIDE)
    assert reference is not None
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["pooled", "last_hidden_state"]
    for batch in BATCHES:
        expected = reference(images(batch))
        actual = session.run(None, {"pixel_values": images(batch)})
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == np.float32
            assert np.abs(ours - theirs).max() <= 1e-4
        assert expected[0].std(axis=0).max() > 1e-3 or batch == 1  # the output tells images apart


@pytest.mark.parametrize("name", zoo.family_params())
def test_graph_is_static_but_for_the_batch(name: str, folder: Path) -> None:
    path = zoo.export_family(name, folder).path
    counts = op_counts(path)
    assert not UNWANTED & counts.keys()
    pools = counts["Softmax"] - zoo_models.DEPTH
    assert pools == (1 if "siglip" in name else 0)
    model = onnx.load(path)
    weights = {weight.name for weight in model.graph.initializer}
    for node in model.graph.node:
        assert not weights.issuperset(node.input), f"{node.name} computes a constant"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [side.dim_value for side in rest] == [3, zoo.SIDE, zoo.SIDE]
    assert str(Path(zoo.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("dinov2-s14", 140),
        ("dinov2-s14-registers", 140),
        ("dinov3-s16", 128),
        ("siglip-b16", 128),
        ("timm-vit-b16", 96),
        ("openclip-b16", 128),
    ],
)
def test_resolution_is_honoured(name: str, side: int, folder: Path, tmp_path: Path) -> None:
    source = zoo.family_source(name, folder)
    recipe = source.export(tmp_path / "m.onnx", resolution=side)
    reference = source.reference(resolution=side)
    assert recipe is not None
    assert reference is not None
    assert (recipe.height, recipe.width) == (side, side)
    default = zoo.export_family(name, folder).recipe
    assert recipe.resize_to[0] / side == pytest.approx(default.resize_to[0] / zoo.SIDE, abs=0.01)
    actual = run_onnx(tmp_path / "m.onnx", images(2, side))
    for ours, theirs in zip(actual, reference(images(2, side)), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.parametrize("name", ["siglip-b16", "openclip-b16"])
def test_an_image_smaller_than_a_patch(name: str, folder: Path, tmp_path: Path) -> None:
    source = zoo.family_source(name, folder)
    with pytest.raises(InputError, match="15 x 15 is smaller than one patch"):
        source.export(tmp_path / "m.onnx", resolution=15)


def test_resolution_defaults_to_the_recipe(folder: Path, tmp_path: Path) -> None:
    # a table of 518 / 14 = 37 x 37 positions, images of 224 / 14 = 16 x 16 patches
    recipe = zoo.family_source("dinov2-s14", folder).export(tmp_path / "m.onnx")
    assert recipe is not None
    assert (recipe.height, recipe.resize_to) == (224, (256, 256))
    assert run_onnx(tmp_path / "m.onnx", images(1, 224))[1].shape == (1, 257, zoo_models.WIDTH)


def test_pooled_is_what_users_compare(folder: Path) -> None:
    import torch
    import transformers

    pixels = torch.from_numpy(images(2))
    cases: dict[str, tuple[Any, str]] = {
        "clip-b16": (transformers.CLIPVisionModelWithProjection, "image_embeds"),
        "siglip-b16": (transformers.SiglipVisionModel, "pooler_output"),
        "dinov3-s16": (transformers.DINOv3ViTModel, "pooler_output"),
    }
    for name, (model_class, output) in cases.items():
        exported = zoo.export_family(name, folder)
        model = model_class.from_pretrained(folder / name).eval()
        with torch.no_grad():
            expected = model(pixel_values=pixels)[output].numpy()
        assert np.abs(run_onnx(exported.path, images(2))[0] - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("openclip-b16-quickgelu", "ViT-B-16-quickgelu"), ("openclip-siglip-b16", "ViT-B-16-SigLIP")],
)
def test_pooled_of_open_clip_is_its_image_embedding(
    name: str, architecture: str, folder: Path
) -> None:
    import open_clip
    import torch
    from safetensors.torch import load_file

    exported = zoo.export_family(name, folder)
    model = open_clip.create_model(f"{architecture}-shallow").eval()
    weights = load_file(folder / name / "weights.safetensors")
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = model.encode_image(torch.from_numpy(images(2))).numpy()
    assert np.abs(run_onnx(exported.path, images(2))[0] - expected).max() <= 1e-4
