"""timm: sources with weights of one's own: files, folders, the hub, options, refusals."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from support import zoo_models
from timm.models import save_for_hf
from torch import Tensor

from regcache.export.extras import unfetched
from regcache.export.source import open_source
from regcache.export.timm_name import TimmName
from regcache.export.timm_vit import TimmSource
from regcache.passes.errors import InputError

NAME = "vit_tiny_patch16_224"
State = dict[str, Tensor]


def model_of(classes: int = 10, name: str = NAME, **options: Any) -> Any:
    """Somebody's fine-tuned encoder: one block, a head of their own."""
    with zoo_models.seeded():
        model = timm.create_model(name, depth=1, num_classes=classes, **options)
    return zoo_models.randomize(model)


def images(side: int = 224) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)


def expected(model: Any, pixels: np.ndarray) -> list[np.ndarray]:
    """timm's own words for what the source promises."""
    with torch.no_grad():
        tokens = model.forward_features(torch.from_numpy(pixels))
        return [model.forward_head(tokens, pre_logits=True).numpy(), tokens.numpy()]


def embed(text: str, pixels: np.ndarray, resolution: int | None = None) -> list[np.ndarray]:
    reference = open_source(text).reference(resolution=resolution)
    assert reference is not None
    return reference(pixels)


def check(text: str, model: Any, pixels: np.ndarray) -> None:
    for ours, theirs in zip(embed(text, pixels), expected(model, pixels), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def as_trainer(state: State) -> dict[str, Any]:
    """What timm's train.py keeps."""
    args = argparse.Namespace(model=NAME, lr=0.1)
    worse = {name: tensor + 1 for name, tensor in state.items()}
    return {"epoch": 3, "arch": NAME, "state_dict": worse, "state_dict_ema": state, "args": args}


def within(state: State, prefix: str) -> State:
    others = {"classifier.weight": torch.zeros(3, 3)}
    return others | {prefix + name: tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "another key": lambda state: {"weights_of_mine": state, "epoch": 1},
    "wrapped": lambda state: {"module." + name: tensor for name, tensor in state.items()},
    "compiled": lambda state: {"_orig_mod." + name: tensor for name, tensor in state.items()},
    "part of another": lambda state: {"state_dict": within(state, "model.backbone.")},
    "trainer": as_trainer,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_where_trainers_put_them(form: str, tmp_path: Path) -> None:
    model = model_of()
    torch.save(FORMS[form](model.state_dict()), tmp_path / "mine.pth")
    check(f"timm:{NAME}/{tmp_path}/mine.pth?depth=1", model, images())


def test_safetensors_relative_and_without_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(state, tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    check(f"timm:{NAME}.augreg_in21k/mine.safetensors?depth=1", model, images())


def test_an_old_torch_file_and_half_precision(tmp_path: Path) -> None:
    model = model_of()
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(halves, tmp_path / "mine.pt", _use_new_zipfile_serialization=False)
    check(f"timm:{NAME}/{tmp_path}/mine.pt?depth=1", model.half().float(), images())


def test_positions_are_resized_as_timm_does(tmp_path: Path) -> None:
    small = model_of(img_size=96)
    file = tmp_path / "mine.safetensors"
    save_file(small.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 10}
    resized = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, depth=1, num_classes=10
    )
    check(f"timm:{NAME}/{file}?depth=1", resized.eval(), images())
    check(f"timm:{NAME}/{file}?depth=1&img_size=96", small, images(96))
    ours = embed(f"timm:{NAME}/{file}?depth=1", images(96), resolution=96)
    np.testing.assert_allclose(ours[0], expected(small, images(96))[0], rtol=1e-5, atol=1e-5)


def test_another_head_and_pool(tmp_path: Path) -> None:
    model = model_of(global_pool="avg")
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    text = f"timm:{NAME}/{tmp_path}/mine.safetensors?depth=1"
    check(f"{text}&global_pool=avg&num_classes=10", model, images())
    with pytest.raises(InputError, match=r"lacks 2 weights, first norm\.weight; has no place for"):
        embed(text, images())
    with pytest.raises(InputError, match="pools no tokens, so there is no embedding"):
        embed(f"timm:{NAME}?pretrained=false&depth=1&global_pool=", images())


def test_random_weights_are_the_same_every_time() -> None:
    text = f"timm:{NAME}?pretrained=false&depth=1&img_size=64"
    before = torch.random.get_rng_state()
    first, second = (embed(text, images(64))[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert first.std() > 0.1
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_traced_computes_the_same(tmp_path: Path) -> None:
    model = model_of(dynamic_img_size=True)
    options = {"depth": 1, "dynamic_img_size": True}
    save_for_hf(model, str(tmp_path), model_args=options, safe_serialization=True)
    source = open_source(f"timm:local-dir:{tmp_path}")
    assert isinstance(source, TimmSource)
    recipe = source._recipe(64)
    assert (recipe.height, recipe.mean) == (64, (0.5, 0.5, 0.5))
    tower = source._tower(recipe)
    with torch.no_grad():
        tower.freeze()
        outputs = tower.outputs(torch.from_numpy(images(64)))
    for ours, theirs in zip(outputs, expected(model, images(64)), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A model as timm itself puts it into a repository, with a recipe of its own."""
    model = model_of(img_size=96)
    model.pretrained_cfg |= {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3)}
    options = {"depth": 1, "img_size": 96}
    save_for_hf(model, str(tmp_path / "saved"), model_args=options, safe_serialization="both")
    return model, tmp_path / "saved"


def test_a_folder_that_timm_saved(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    check(f"timm:local-dir:{folder}", model, images(96))
    source = open_source(f"timm:local-dir:{folder}")
    assert isinstance(source, TimmSource)
    assert source._recipe(None).mean == (0.1, 0.2, 0.3)
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    check(f"timm:local-dir:{folder}", model, images(96))
    (folder / "other.pth").touch()
    with pytest.raises(InputError, match=r"not clear: mine\.safetensors, other\.pth"):
        embed(f"timm:local-dir:{folder}", images(96))


def test_a_repository_on_the_hub(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved
    (folder / "model.safetensors").unlink()  # older ones have PyTorch's file alone
    asked = []

    def download(repository: str, file: str, *, revision: str | None) -> str:
        asked.append((repository, revision))
        if not (folder / file).is_file():
            raise EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    check("timm:hf-hub:someone/mine@v2", model, images(96))
    assert set(asked) == {("someone/mine", "v2")}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "config.json: "),
        ("[" * 100_000, "config.json: "),
        ("[]", "names no architecture"),
        ({"model_type": "vit"}, "names no architecture of timm; did you mean hf:"),
        ({"architecture": "resnet18"}, "resnet18 is not supported; of timm's models"),
        ({"architecture": "vit_tini_patch16_224"}, f"did you mean timm:{NAME}"),
        ({"architecture": NAME, "pretrained_cfg": 3}, "pretrained_cfg is no object"),
        ({"architecture": NAME, "pretrained_cfg": {"mean": "red"}}, "config.json: "),
        ({"architecture": NAME, "pretrained_cfg": {"input_size": [3]}}, "config.json: "),
        ({"architecture": NAME, "model_args": {"block_fn": "os.system"}}, "block_fn='os.system'"),
        ({"architecture": NAME, "model_args": {"in_chans": 1}}, "in_chans=1 is not supported"),
    ],
)
def test_a_bad_config_is_one_clear_line(config: Any, reason: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        open_source(f"timm:local-dir:{tmp_path}").reference()
    assert "\n" not in str(caught.value)


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


BAD: dict[str, tuple[Callable[[State], Any], str]] = {
    "lacks": (
        lambda s: without(s, "norm.weight", "norm.bias"),
        r"does not fit vit_tiny_patch16_224: lacks 2 weights, first norm\.weight$",
    ),
    "others": (lambda s: s | {"neck.w": torch.ones(1)}, r"has no place for neck\.w$"),
    "shape": (
        lambda s: s | {"blocks.0.attn.qkv.weight": torch.ones(3, 192)},
        r"blocks\.0\.attn\.qkv\.weight is \[3, 192\], not \[576, 192\]$",
    ),
    "list": (list, "mine.pth: it holds no weights"),
    "tensor": (lambda _: torch.ones(3), "mine.pth: it holds no weights"),
    "numbers": (lambda _: {"epoch": 3}, "mine.pth: it holds no weights"),
    "two": (lambda s: {"student": s, "teacher": s}, r"several models or none \(student, teacher\)"),
    "two inside": (
        lambda s: within(s, "student.") | within(s, "teacher."),
        "holds several encoders: 'student.', 'teacher.'",
    ),
    "foreign": (lambda _: {"layer.weight": torch.ones(3)}, "does not fit .*lacks .* first"),
    "pickle": (lambda s: {"state_dict": s, "made_by": Path("x")}, "pickles are never run"),
}


@pytest.mark.parametrize("kind", BAD)
def test_weights_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    build, reason = BAD[kind]
    torch.save(build(model_of().state_dict()), tmp_path / "mine.pth")
    with pytest.raises(InputError, match=reason) as caught:
        open_source(f"timm:{NAME}/{tmp_path}/mine.pth?depth=1").reference()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("mine.pth", b"", "it is no file of weights"),
        ("mine.pth", b"version https://git-lfs.github.com/spec/v1\n", "it is no file of weights"),
        ("mine.pth", b"PK\x03\x04 and nothing", "mine.pth: "),
        ("mine.pth", b"\x80\x02 and nothing", "mine.pth: "),
        ("mine.safetensors", b"", "mine.safetensors: "),
        ("mine.safetensors", b"\xff" * 64, "mine.safetensors: "),
        ("mine.onnx", b"", "weights come as safetensors or from PyTorch, not as ONNX"),
    ],
)
def test_files_that_hold_no_weights(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        open_source(f"timm:{NAME}/{tmp_path / name}?depth=1").reference()
    assert "\n" not in str(caught.value)


def test_names_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").touch()
    for text, reason in (
        (f"timm:{NAME}/{tmp_path}/bset.safetensors", "no such file; did you mean best.safetensors"),
        (f"timm:{NAME}/{tmp_path}", "is a folder, not a file of weights"),
        (f"timm:{tmp_path}/saved", f"did you mean timm:local-dir:{tmp_path}/saved"),
        (f"timm:local-dir:{tmp_path}", "no config.json in it; give timm:NAME/FILE"),
        (f"timm:local-dir:{tmp_path}/no", "no such folder"),
        ("timm:timm/vit_small", "no such file; did you mean timm:hf-hub:timm/vit_small"),
        ("timm:hf_hub:a/b?depth=1", r"did you mean timm:hf-hub:a/b\?depth=1"),
        ("timm:hf-hub:", "expected timm:NAME, timm:NAME/FILE"),
        (f"timm:{NAME}/", "expected timm:NAME, timm:NAME/FILE"),
        (f"timm:{NAME}?img_sise=96", "'img_sise' is no option .*; did you mean img_size"),
        (f"timm:{NAME}?colour=red", "'colour' is no option .*; it takes img_size, "),
        (f"timm:{NAME}?img_size=large", "img_size takes a whole number, not 'large'"),
        (f"timm:{NAME}?img_size", "img_size takes a whole number, as img_size=VALUE"),
        (f"timm:{NAME}?pretrained=no", "pretrained takes true or false, not 'no'"),
        (f"timm:{NAME}?init_values=x", "init_values takes a number, not 'x'"),
        (f"timm:{NAME}/{tmp_path}/best.safetensors?pretrained=false", "leaves no use for"),
    ):
        with pytest.raises(InputError, match=reason):
            open_source(text)


def test_what_only_timm_can_tell(tmp_path: Path) -> None:
    for text, reason in (
        ("timm:vit_tiny_patch61_224", f"no model of that name; did you mean timm:{NAME}"),
        (f"timm:{NAME}.augreg_in12k", f"did you mean timm:{NAME}.augreg_in21k"),
        (f"timm:{NAME}?pretrained=false&global_pool=most", "global_pool=most: "),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            open_source(text).export(tmp_path / "m.onnx")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="img_size=96, but the resolution is 64"):
        open_source(f"timm:{NAME}?img_size=96").export(tmp_path / "m.onnx", resolution=64)


def test_sizes_that_are_no_patches(tmp_path: Path) -> None:
    """PyTorch would raise from within the convolution, timm assert."""
    for options, side, reason in (
        ("", 7, "7 x 7 is smaller than one patch"),
        ("&dynamic_img_size=true", 7, "7 x 7 is smaller than one patch"),
        ("&dynamic_img_size=true", 40, "40 x 40 has to be a multiple of 16 x 16"),
    ):
        source = open_source(f"timm:{NAME}?pretrained=false&depth=1{options}")
        with pytest.raises(InputError, match=reason):
            source.export(tmp_path / "m.onnx", resolution=side)
        with pytest.raises(InputError, match=reason):
            source.reference(resolution=side)
    assert not (tmp_path / "m.onnx").exists()


def test_a_name_is_parsed() -> None:
    assert TimmName.parse("", "a.b") == TimmName("a.b")
    assert TimmName.parse("", "hf-hub:o/m@1?depth=2&mlp_ratio=3.5&qk_norm=true") == TimmName(
        None, "hf-hub", "o/m@1", {"depth": 2, "mlp_ratio": 3.5, "qk_norm": True}
    )
    assert TimmName.parse("", "a?pretrained=false") == TimmName("a", "random")
    assert TimmName.parse("", "a?pretrained=true") == TimmName("a")


def test_weights_at_an_address_of_their_own_are_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's switch does not reach them."""
    address = "https://example.com/vit.pth"
    config = SimpleNamespace(url=address, hf_hub_id=None)
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda _: config)
    with unfetched(), pytest.raises(InputError, match=address):
        TimmSource.open(f"timm:{NAME}", NAME)._create((224, 224))
