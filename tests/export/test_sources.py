"""Naming sources: what is refused and how, ONNX files, hostile checkpoints, lazy imports."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import zoo_models

from regcache.export import extras
from regcache.export.onnx_file import sidecar
from regcache.export.source import open_source
from regcache.passes.errors import InputError, MissingExtraError
from regcache.passes.preprocess import Preprocess

RECIPE = Preprocess(8, 8, "shortest", (9, 9), "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def tiny_model(path: Path, external: bool = False) -> Path:
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "weight")
    image = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8])
    pooled = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None)
    node = helper.make_node("MatMul", ["pixel_values", "weight"], ["pooled"])
    graph = helper.make_graph([node], "tiny", [image], [pooled], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "is no source; expected FILE.onnx, hf:ID_OR_DIR"),
        ("", "is no source; expected"),
        ("ftp:model", "is no source"),
        ("hf:", "is no source"),
        ("missing.onnx", "no such file"),
        ("hf:./missing", "no such folder"),
        ("sample:other", "did you mean sample:dinov2-small"),
        ("openclip:ViT-B-16", "expected openclip:ARCH/TAG"),
    ],
)
def test_a_bad_name_is_refused_at_once(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_source(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("timm:no_such_model", "timm has no model of that name$"),
        ("timm:vit_base_patch16_224.no_tag", "Invalid pretrained tag"),
        ("openclip:no-such-arch/tag", "open_clip has no architecture no-such-arch$"),
        ("openclip:vitb16/openai", "did you mean openclip:ViT-B-16"),
        ("openclip:ViT-B-16/laion2b_s34b", r"; did you mean laion2b_s34b_b88k\?; its tags are"),
        ("openclip:ViT-B-16/no.safetensors", "no.safetensors: no such file$"),
        ("openclip:ViT-B-16/no-tag", "no file and no tag of ViT-B-16; its tags are .*laion2b"),
        ("openclip:ViT-B-16/openai", "trained with QuickGELU"),
    ],
)
def test_a_name_its_library_does_not_know(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        open_source(text).export(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("HF:facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("huggingface:facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("https://huggingface.co/facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("somebody/of_mine.v2", "hf:somebody/of_mine.v2"),
        ("dinov2-base", "hf:facebook/dinov2-base"),
        ("clip-vit-base-patch32", "hf:openai/clip-vit-base-patch32"),
        ("sampel:dinov2-small", "sample:dinov2-small"),
        ("sample", "sample:dinov2-small"),
        ("Timm:vit_base_patch16_224", "timm:vit_base_patch16_224"),
        ("vit_base_patch16_224", "timm:vit_base_patch16_224"),
        ("vit_base_patch16_224.augreg_in1k", "timm:vit_base_patch16_224.augreg_in1k"),
        ("vit_base_patch61_224", "timm:vit_base_patch16_224"),
        ("vit_base_patch16_224/mine.pth", "timm:vit_base_patch16_224/mine.pth"),
        ("timm/vit_base_patch16_224.augreg_in1k", "timm:hf-hub:timm/vit_base_patch16_224."),
        ("open_clip:ViT-B-16/openai", "openclip:ViT-B-16/openai"),
        ("ViT-B-16/openai", "openclip:ViT-B-16/openai"),
        ("vit-b-16", "openclip:ViT-B-16"),
    ],
)
def test_what_was_meant_is_asked(text: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        open_source(text)
    assert f"is no source; did you mean {meant}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_files_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, config in (("of_hf", {"model_type": "vit"}), ("of_timm", {"architecture": "v"})):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps(config))
    Path("of_onnx").mkdir()
    for file in ("of_onnx/encoder.onnx", "best.safetensors", "of_hf/model.safetensors"):
        Path(file).touch()
    for text, meant in (
        ("of_hf", "is no source; did you mean hf:of_hf?"),
        (f"{tmp_path}/of_timm/", f"is no source; did you mean timm:local-dir:{tmp_path}/of_timm/?"),
        ("of_onnx", "is no source; did you mean of_onnx/encoder.onnx?"),
        ("best.safetensors", "did you mean timm:NAME/best.safetensors or openclip:ARCH/best.safe"),
        ("hf:of_hf/model.safetensors", "is a file; did you mean the folder, hf:of_hf?"),
        ("of_onnx/Encodr.onnx", "no such file; did you mean of_onnx/encoder.onnx?"),
        ("of_nothing/encoder.onnx", "no such file; there is no folder of_nothing"),
        ("of_hf/encoder.onnx", "of_hf/encoder.onnx: no such file"),
    ):
        with pytest.raises(InputError) as caught:
            open_source(text)
        assert meant in str(caught.value)


def test_a_hub_that_does_not_know_a_name_may_know_another(tmp_path: Path) -> None:
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in ("dinov2-smal", "facebook/dinov2-smal"):
            with pytest.raises(InputError, match="did you mean hf:facebook/dinov2-small"):
                open_source(f"hf:{name}").export(tmp_path / "m.onnx")


def test_no_network_is_one_clear_line(tmp_path: Path) -> None:
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        names = ("hf:nobody/no-model", "timm:vit_tiny_patch16_224", "openclip:ViT-B-16/dfn2b")
        for text in (*names, "timm:hf-hub:nobody/no-model"):
            with pytest.raises(InputError) as caught:
                open_source(text).export(tmp_path / "m.onnx")
            assert str(caught.value).startswith(f"{text}: ")
            assert "\n" not in str(caught.value)


def test_other_architectures_are_named_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"bert is not supported; supported are clip, .*deit"):
        open_source(f"hf:{tmp_path}").export(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"resnet18 is not supported; of timm's models"):
        open_source("timm:resnet18").export(tmp_path / "m.onnx")
    weights = tmp_path / "unread.safetensors"
    weights.touch()
    for architecture in ("RN50", "coca_ViT-B-32", "EVA02-B-16"):
        with pytest.raises(InputError, match="is not supported; "):
            open_source(f"openclip:{architecture}/{weights}").export(tmp_path / "m.onnx")


@pytest.mark.parametrize("text", ["{", '{"model_type": "no such"}', "{}"])
def test_a_broken_config_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        open_source(f"hf:{tmp_path}").export(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    zoo_models.FAMILIES["deit-s16"](tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    trace = tmp_path / "ran"
    torch.save({"weight": Malicious(trace)}, tmp_path / "hf" / "pytorch_model.bin")
    torch.save({"visual.proj": Malicious(trace)}, tmp_path / "clip.pt")
    for text in (f"hf:{tmp_path / 'hf'}", f"openclip:ViT-B-16/{tmp_path / 'clip.pt'}"):
        with pytest.raises(InputError, match="pickles are never run; convert it to safetensors"):
            open_source(text).export(tmp_path / "m.onnx")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # the trap works


def test_code_that_comes_with_a_checkpoint_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "ran"
    source = zoo_models.FAMILIES["deit-s16"](tmp_path / "hf")
    (tmp_path / "hf" / "mine.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "mine.C", "AutoModel": "mine.M"}),
        ("preprocessor_config.json", {"AutoImageProcessor": "mine.P"}),
    ):
        path = tmp_path / "hf" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda _: "y")  # `yes |`
    assert source.reference() is not None
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mine"}))
    with pytest.raises(InputError) as caught:
        source.reference()
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = zoo_models.FAMILIES["deit-s16"](tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, first layernorm\.weight"):
        source.export(tmp_path / "m.onnx")
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match="does not fit ViT-B-16"):
        open_source(f"openclip:ViT-B-16/{tmp_path / 'clip.safetensors'}").reference()


@pytest.mark.parametrize("external", [False, True])
def test_an_onnx_file_is_rewritten_with_its_data(external: bool, tmp_path: Path) -> None:
    """In one file, whatever the source's data was called; see test_adopt for the rest."""
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    path = tiny_model(tmp_path / "from" / "encoder.onnx", external)
    sidecar(path).write_text(RECIPE.to_json())
    source = open_source(str(path))
    assert source.export(tmp_path / "to" / "copy.onnx") == RECIPE
    assert source.reference() is None
    assert [file.name for file in (tmp_path / "to").iterdir()] == ["copy.onnx"]
    copy = onnx.load(tmp_path / "to" / "copy.onnx")
    assert numpy_helper.to_array(copy.graph.initializer[0]).sum() == 64


def test_an_onnx_file_without_sidecar_has_no_recipe(tmp_path: Path) -> None:
    source = open_source(str(tiny_model(tmp_path / "encoder.onnx")))
    assert source.export(tmp_path / "copy.onnx") is None
    with pytest.raises(InputError, match="the image is fixed at 8 x 8 in the file"):
        source.export(tmp_path / "copy.onnx", resolution=16)
    sidecar(tmp_path / "encoder.onnx").write_text("{}")
    with pytest.raises(InputError, match=r"encoder\.preprocess\.json: not a preprocessing recipe"):
        source.export(tmp_path / "copy.onnx")


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "encoder.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../secret"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="outside the model's folder"):
        open_source(str(path)).export(tmp_path / "copy.onnx")


def test_missing_libraries_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "timm" else object())
    with pytest.raises(MissingExtraError, match=r'needs timm: pip install "regcache\[export\]"'):
        open_source("timm:vit_base_patch16_224")


def test_importing_and_opening_load_nothing_heavy() -> None:
    script = """
import importlib, pkgutil, sys
import regcache.export as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"regcache.export.{module.name}")
from regcache.export.source import open_source
open_source("timm:x"), open_source("openclip:a/b"), open_source("hf:a/b")
heavy = {"torch", "torchvision", "transformers", "timm", "open_clip", "onnxscript", "onnx_ir"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
