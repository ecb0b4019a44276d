"""Text embeddings of openclip: sources against open_clip's own encode_text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from support.tiny_text import TEXTS, open_clip_plain, open_clip_roberta, open_clip_siglip

from regcache.export.source import open_source
from regcache.export.text_tower import embed_texts
from regcache.passes.errors import InputError


@pytest.mark.parametrize("build", [open_clip_plain, open_clip_siglip, open_clip_roberta])
@pytest.mark.parametrize("form", ["safetensors", "trainer", "half"])
def test_open_clip_equals_encode_text(
    build: Callable[[Path], tuple[str, Any]], form: str, tmp_path: Path
) -> None:
    name, model = build(tmp_path)
    if form == "half":
        model = model.half().float()
    state = model.state_dict()
    file = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        save_file(state, file)
    elif form == "trainer":
        torch.save({"state_dict": {f"module.{key}": state[key] for key in state}}, file)
    else:
        torch.save({key: state[key].half() for key in state}, file)
    found = embed_texts(f"openclip:{name}/{file}", TEXTS, batch_size=3)
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS)).numpy()
    assert found.shape == (4, 24)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5


def test_an_encoder_that_yields_its_tokens_too(tmp_path: Path) -> None:
    name, model = open_clip_siglip(tmp_path, output_tokens=True)
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    found = embed_texts(f"openclip:{name}/{tmp_path / 'clip.safetensors'}", TEXTS)
    with torch.no_grad():
        expected, _ = model.text(open_clip.get_tokenizer(name)(TEXTS))
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_a_buffer_of_older_checkpoints_is_ignored(tmp_path: Path) -> None:
    name, model = open_clip_roberta(tmp_path)
    state = model.state_dict() | {"text.transformer.embeddings.position_ids": torch.arange(9)}
    save_file(state, tmp_path / "old.safetensors")
    assert embed_texts(f"openclip:{name}/{tmp_path / 'old.safetensors'}", TEXTS).shape == (4, 24)


def test_the_old_layout_of_a_custom_text_encoder_is_read(tmp_path: Path) -> None:
    name, model = open_clip_siglip(tmp_path)
    state = {key.removeprefix("text."): tensor for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "old.safetensors")
    found = embed_texts(f"openclip:{name}/{tmp_path / 'old.safetensors'}", TEXTS)
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS)).numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_texts_and_images_share_a_space(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    name, model = open_clip_plain(tmp_path)
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    source = f"openclip:{name}/{tmp_path / 'clip.safetensors'}"
    reference = open_source(source).reference()
    assert reference is not None
    with torch.no_grad():
        expected = model.encode_image(torch.from_numpy(images)).numpy()
    assert np.abs(reference(images)[0] - expected).max() < 1e-5
    assert embed_texts(source, ["cat"]).shape == (1, expected.shape[1])


def test_a_file_of_the_vision_tower_alone_says_so(tmp_path: Path) -> None:
    name, model = open_clip_plain(tmp_path)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
    save_file(state, tmp_path / "vision.safetensors")
    with pytest.raises(InputError, match=r"holds only a vision tower, no text enc") as error:
        embed_texts(f"openclip:{name}/{tmp_path / 'vision.safetensors'}", TEXTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda state: state.pop("ln_final.weight"), r"does not fit the text encoder of tiny"),
        (lambda state: state.clear(), "holds no weights of open_clip"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    broken: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path
) -> None:
    name, model = open_clip_plain(tmp_path)
    state = dict(model.state_dict())
    broken(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(InputError, match=reason) as error:
        embed_texts(f"openclip:{name}/{tmp_path / 'clip.pt'}", TEXTS)
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_never_runs(tmp_path: Path) -> None:
    name, _ = open_clip_plain(tmp_path)
    torch.save({"ln_final.weight": Malicious(tmp_path / "ran")}, tmp_path / "clip.pt")
    with pytest.raises(InputError, match="pickles are never run"):
        embed_texts(f"openclip:{name}/{tmp_path / 'clip.pt'}", TEXTS)
    assert not (tmp_path / "ran").exists()
