"""Recipes read from what libraries leave beside weights are those of the libraries themselves."""

import contextlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.auto import image_processing_auto

from regcache.export.onnx_file import OnnxFileSource, sidecar
from regcache.export.processor_config import MODEL_TYPES, PROCESSORS
from regcache.export.recipe import from_image_processor
from regcache.export.recipe_file import read_recipe, recipe_beside
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

OURS = Preprocess(
    8, 8, "squash", (9, 9), "nearest", (0.1, 0.2, 0.3), (1, 2, 3), background=(1, 2, 3)
)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As found beside weights, old and new.
FILES: dict[str, dict[str, Any]] = {
    "clip of 2021": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224,
    },
    "clip of 2023": {
        "crop_size": {"height": 336, "width": 336}, "do_convert_rgb": True, "do_rescale": True,
        "image_processor_type": "CLIPImageProcessor", "rescale_factor": 0.00392156862745098,
        "resample": 3, "size": {"shortest_edge": 336},
    },
    "clip, wide": {
        "crop_size": {"height": 200, "width": 300}, "size": {"shortest_edge": 310},
        "image_processor_type": "CLIPImageProcessorFast",
    },
    "clip, squashed and not cropped": {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": [240, 250],
    },
    "clip that does not convert": {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": False,
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, **IMAGENET,
    },
    "siglip with nulls": {
        "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": None, "resample": None,
        "size": {"height": 384, "width": 384}, "image_mean": None, "do_normalize": None,
        "do_rescale": None, "rescale_factor": None,
    },
    "clip with nulls": {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": None, "crop_size": None,
        "size": {"height": 100, "width": 90}, "do_pad": None,
    },
    "convnext with nulls": {"image_processor_type": "ConvNextImageProcessor", "crop_pct": None},
    "vit of 2021": {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": 224,
    },
    "vit, nothing but pixels": {
        "image_processor_type": "ViTImageProcessor", "do_normalize": False, "do_rescale": False,
    },
    "vit, one mean for all": {
        "image_processor_type": "ViTImageProcessor", "image_mean": 0.4, "image_std": 0.3,
    },
    "vit that converts, other numbers": {
        "image_processor_type": "ViTImageProcessorPil", "do_convert_rgb": True, "resample": 1,
        "rescale_factor": 0.0078,
    },
    "vit that crops": {
        "image_processor_type": "ViTImageProcessor", "do_center_crop": True, "crop_size": 200,
    },
    "deit of 2021": {
        "crop_size": 224, "do_center_crop": True, "size": 256, "resample": 3,
        "feature_extractor_type": "DeiTFeatureExtractor", **IMAGENET,
    },
    "beit that crops": {
        "image_processor_type": "BeitImageProcessor", "do_center_crop": True, "size": 256,
    },
    "beit": {"feature_extractor_type": "BeitFeatureExtractor", "size": 240},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": 224},
    "convnext, another share": {
        "feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.95, "size": 288,
    },
    "convnext as it is": {"image_processor_type": "ConvNextImageProcessor"},
    "dinov3": {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": 518, **IMAGENET},
    "dpt": {
        "image_processor_type": "DPTImageProcessor", "ensure_multiple_of": 14, "size": [520, 390],
    },
    "no resize": {"image_processor_type": "CLIPImageProcessor", "do_resize": False},
}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def transformers_own(folder: Path) -> Preprocess:
    """By transformers' own reading of a folder and the recipe of the processor it makes."""
    loader: Any = transformers.AutoImageProcessor
    return from_image_processor(loader.from_pretrained(folder, backend="pil"))


@pytest.mark.parametrize("name", FILES)
def test_a_processor_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "preprocessor_config.json", FILES[name])
    assert read_recipe(file) == transformers_own(tmp_path)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_file_leaves_out_is_the_default_of_its_class(kind: str, tmp_path: Path) -> None:
    content = {"image_processor_type": f"{kind}ImageProcessor"}
    recipe = read_recipe(write(tmp_path / "preprocessor_config.json", content))
    processor: Any = getattr(transformers, f"{kind}ImageProcessor")
    assert recipe == from_image_processor(processor())
    processor().save_pretrained(tmp_path)  # all of it said
    assert read_recipe(tmp_path / "preprocessor_config.json") == recipe


def test_the_model_says_which_class_where_the_file_does_not(tmp_path: Path) -> None:
    module: Any = image_processing_auto
    mapping = module.IMAGE_PROCESSOR_MAPPING_NAMES
    for model_type, kind in MODEL_TYPES.items():
        if model_type in mapping:
            assert mapping[model_type]["torchvision"] == f"{kind}ImageProcessor"
    file = write(tmp_path / "preprocessor_config.json", {"size": 256, "crop_size": 240})
    write(tmp_path / "config.json", {"model_type": "dinov2"})
    assert read_recipe(file) == transformers_own(tmp_path)
    assert read_recipe(file).resize_to == (256, 256)


def test_without_a_class_a_file_has_to_say_everything(tmp_path: Path) -> None:
    whole = {"do_resize": True, "size": 224, "resample": 2, "do_normalize": True, **IMAGENET}
    file = write(tmp_path / "preprocessor_config.json", whole)
    recipe = read_recipe(file)
    write(file, {**whole, "image_processor_type": "ViTImageProcessor"})
    assert recipe == transformers_own(tmp_path)
    write(
        file, {key: value for key, value in whole.items() if key not in ("resample", "image_std")}
    )
    with pytest.raises(InputError, match=r"no image_processor_type and has no resample, image_std"):
        read_recipe(file)


def test_a_processor_within_a_processor_goes_first(tmp_path: Path) -> None:
    images: Any = transformers.SiglipImageProcessorPil(size={"height": 256, "width": 256})
    nested = {"image_processor": images.to_dict(), "processor_class": "SiglipProcessor"}
    write(tmp_path / "processor_config.json", json.dumps(nested, default=dict))
    write(tmp_path / "preprocessor_config.json", FILES["clip of 2021"])
    assert recipe_beside(tmp_path / "m.onnx") == transformers_own(tmp_path)
    write(tmp_path / "processor_config.json", {"processor_class": "CLIPProcessor"})
    assert recipe_beside(tmp_path / "m.onnx") == transformers_own(tmp_path)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_what_timm_writes_is_read(name: str, tmp_path: Path) -> None:
    from regcache.export.timm_vit import data_recipe

    library: Any = timm
    model = library.create_model("vit_tiny_patch16_224")
    model.pretrained_cfg = library.get_pretrained_cfg(name).to_dict()
    file = tmp_path / "config.json"
    library.models._hub.save_config_for_hf(model, file)
    assert recipe_beside(tmp_path / "m.onnx") == read_recipe(file)
    assert read_recipe(file) == data_recipe(model.pretrained_cfg)
    written = json.loads(file.read_text())
    assert read_recipe(write(tmp_path / "old.json", written["pretrained_cfg"])) == read_recipe(file)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_what_open_clip_writes_is_read(resize_mode: str, tmp_path: Path) -> None:
    from open_clip.push_to_hf_hub import save_config_for_hf

    mean, std = (0.5, 0.6, 0.7), (0.4, 0.3, 0.2)
    cfg = open_clip.transform.PreprocessCfg(224, "RGB", mean, std, "bilinear", resize_mode)
    visual = SimpleNamespace(
        image_mean=cfg.mean, image_std=cfg.std, preprocess_cfg=vars(cfg), image_size=224
    )
    file = tmp_path / "open_clip_config.json"
    save_config_for_hf(
        SimpleNamespace(visual=visual), file, {"vision_cfg": {"image_size": 240}, "embed_dim": 8}
    )
    assert recipe_beside(tmp_path / "m.onnx") == read_recipe(file)
    mode: Any = resize_mode
    assert read_recipe(file) == Preprocess(
        240, 240, mode, (240, 240), "bilinear", mean, std, rgb_last=True
    )


def test_our_own_file_is_read_also_from_older_versions(tmp_path: Path) -> None:
    file = write(tmp_path / "any.json", OURS.to_json())
    assert read_recipe(file) == OURS
    older = json.loads(OURS.to_json())
    for key in ("layout", "dtype", "background", "rgb_last"):
        del older[key]
    write(file, "\ufeff" + json.dumps(older))  # a byte order mark, as some editors write
    assert read_recipe(file) == replace(OURS, background=None)


def test_the_place_of_a_file_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "repo" / "onnx" / "model.onnx", "")
    assert recipe_beside(model) is None
    write(tmp_path / "repo" / "config.json", {"model_type": "clip", "vision_config": {}})
    assert recipe_beside(model) is None
    above = write(tmp_path / "repo" / "preprocessor_config.json", FILES["dinov2"])
    assert recipe_beside(model) == read_recipe(above)
    assert recipe_beside(write(tmp_path / "repo" / "int8" / "model.onnx", "")) is None
    beside = write(model.parent / "open_clip_config.json", {"model_cfg": {}})
    assert recipe_beside(model) == read_recipe(beside)
    own = OnnxFileSource.open(str(model))
    assert own.recipe(None) == read_recipe(beside)
    scaled = own.recipe(448)
    assert scaled is not None
    assert (scaled.height, scaled.resize_to) == (448, (448, 448))
    model.rename(tmp_path / "blob")
    model.symlink_to(tmp_path / "blob")  # the hub's cache is made of links
    assert own.recipe(None) == read_recipe(beside)
    monkeypatch.chdir(model.parent)
    beside.unlink()
    assert recipe_beside(Path("model.onnx")) == read_recipe(above)
    sidecar(model).write_text(OURS.to_json())
    assert own.recipe(None) == OURS


def test_the_documentation_names_every_field_and_class() -> None:
    text = (Path(__file__).parents[2] / "docs/preprocessing.md").read_text()
    table, files = text.split("## Files of the libraries")
    for field in fields(Preprocess):
        assert f"`{field.name}`" in table
        assert f'"{field.name}": ' in table
    read = files[files.index("Read are") : files.index("Without a")]
    words = set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", read)))
    assert words - {"Read", "are", "and"} == set(PROCESSORS)


REFUSED: list[tuple[Any, str]] = [
    ("{", "not a preprocessing recipe: Expecting"),
    ("[1]", "it holds no JSON object"),
    ("[" * 100_000, "not a preprocessing recipe: maximum recursion"),
    ("\udce4", "not a preprocessing recipe"),
    ({}, "not a preprocessing recipe: neither a preprocess.json nor"),
    ({"model_type": "clip"}, "not a preprocessing recipe: neither"),
    ({"resize": "squash", "resize_to": [8, 8], "mean": 3}, "not a preprocessing recipe"),
    ({**json.loads(OURS.to_json()), "dtype": "int8"}, "dtype must be one of float32, uint8"),
    ({**json.loads(OURS.to_json()), "layout": "hwc"}, "layout must be one of nchw, nhwc"),
    ({**json.loads(OURS.to_json()), "dtype": "uint8"}, "rescale and std must be 1, mean 0"),
    ({**json.loads(OURS.to_json()), "background": [0, 0, 256]}, "from 0 to 255"),
    ({**json.loads(OURS.to_json()), "background": 7}, "not a preprocessing recipe"),
    ({**json.loads(OURS.to_json()), "rgb_last": 1}, "rgb_last must be true or false"),
    ({**json.loads(OURS.to_json()), "height": 8.5}, "sizes must be positive whole"),
    ({**json.loads(OURS.to_json()), "colour": 1}, "unexpected keyword argument 'colour'"),
    ({"image_processor_type": "SamImageProcessor"}, "SamImageProcessor is not supported; supp"),
    ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 9}}, "size .* is not"),
    ({"image_processor_type": "CLIPImageProcessor", "size": "big"}, "size big is not supported"),
    ({"image_processor_type": "CLIPImageProcessor", "size": 0}, "size .* is not supported"),
    ({"image_processor_type": "CLIPImageProcessor", "resample": 5}, "Pillow filter 5"),
    ({"image_processor_type": "CLIPImageProcessor", "rescale_factor": "x"}, "a positive number"),
    ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "padding is not supported"),
    ({"image_processor_type": "CLIPImageProcessor", "use_square_size": True}, "use_square_size"),
    ({"image_processor_type": "CLIPImageProcessor", "image_mean": [1, 2]}, "expected 3 channels"),
    ({"image_processor_type": "CLIPImageProcessor", "image_mean": ["a"] * 3}, "not a prepro"),
    ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "neither a crop nor"),
    ({"image_processor_type": "SiglipImageProcessor", "size": 224}, "neither a crop nor"),
    ({"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True}, "keep_aspect_ratio"),
    ({"pretrained_cfg": {"crop_mode": "border"}}, "crop mode 'border' is not supported"),
    ({"pretrained_cfg": {"input_size": 224}}, "not a preprocessing recipe"),
    ({"model_cfg": {}, "preprocess_cfg": {"resize_mode": "longest"}}, "longest is not supported"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_is_no_recipe_is_named(content: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "any.json"
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"^{file}: .*{reason}") as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_neighbour_that_cannot_be_expressed_says_what_replaces_it(tmp_path: Path) -> None:
    write(tmp_path / "preprocessor_config.json", {"image_processor_type": "SamImageProcessor"})
    with pytest.raises(InputError, match=r"SamImageProcessor .*\(--preprocess FILE replaces it\)"):
        recipe_beside(tmp_path / "m.onnx")
    write(tmp_path / "preprocessor_config.json", "{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json: not a preprocessing recipe"):
        recipe_beside(tmp_path / "m.onnx")
    (tmp_path / "preprocessor_config.json").unlink()
    write(tmp_path / "config.json", "{")  # of whatever it is
    assert recipe_beside(tmp_path / "m.onnx") is None
    write(tmp_path / "config.json", {"pretrained_cfg": {"crop_mode": "border"}})
    with pytest.raises(InputError, match="'border'"):
        recipe_beside(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        read_recipe(tmp_path / "none.json")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
WHOLE: list[dict[str, Any]] = [
    json.loads(OURS.to_json()),
    {"image_processor_type": "ConvNextImageProcessor", **PROCESSORS["ConvNext"]},
    {"image_processor_type": "CLIPImageProcessor", **PROCESSORS["CLIP"]},
    {"pretrained_cfg": {}, "input_size": [3, 8, 8], "crop_pct": 0.9, "crop_mode": "center"},
    {"input_size": [3, 8, 8], "crop_pct": 0.9, "crop_mode": "center", "mean": [1, 2, 3]},
    {"model_cfg": {"vision_cfg": {"image_size": 8}}, "preprocess_cfg": {"mean": [1, 2, 3]}},
]


@given(data=st.data(), whole=st.sampled_from(WHOLE))
def test_no_value_of_any_type_is_a_traceback(
    data: st.DataObject, whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = {**whole, data.draw(st.sampled_from(sorted(whole))): data.draw(VALUES)}
    file = write(tmp_path_factory.getbasetemp() / "changed.json", changed)
    with contextlib.suppress(InputError):
        recipe = read_recipe(file)
        assert Preprocess.from_json(recipe.to_json()) == recipe
