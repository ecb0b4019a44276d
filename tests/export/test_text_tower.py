"""Text embeddings of hf: sources against transformers' own models, over tokens spelt out here."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from support.tiny_text import (
    LONGEST,
    SIZES,
    TEXTS,
    VISION,
    clip,
    clip_ids,
    gemma,
    gemma_ids,
    siglip,
)

from regcache.export import extras
from regcache.export.source import open_source
from regcache.export.text_tower import embed_texts
from regcache.passes.errors import InputError, MissingExtraError


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("clip"))


def text_features(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """One text at a time, without padding other than what `ids` hold."""
    with torch.no_grad():
        features: NDArray[np.float32] = model.get_text_features(
            torch.tensor([ids])
        ).pooler_output.numpy()
    return features


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_clip_equals_its_projected_text_features(clip_folder: Path, batch_size: int) -> None:
    found = embed_texts(f"hf:{clip_folder}", TEXTS, batch_size)
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    expected = np.concatenate([text_features(model, clip_ids(text)) for text in TEXTS])
    assert found.shape == (4, 24)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found[1:] - found[:-1]).max() > 0.01  # the output tells texts apart


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "Siglip2Tokenizer"])
def test_siglip_2_reads_lower_case_padded_and_unmasked(kind: str, tmp_path: Path) -> None:
    folder = siglip(tmp_path, gemma(kind))  # its tokenizer yields a mask, which must not be used
    model = transformers.SiglipModel.from_pretrained(folder)
    expected = np.concatenate([text_features(model, gemma_ids(text)) for text in TEXTS])
    for batch_size in (1, 3):
        found = embed_texts(f"hf:{folder}", TEXTS, batch_size)
        assert found.shape == (4, 32)
        assert np.abs(found - expected).max() < 1e-5
    assert (embed_texts(f"hf:{folder}", ["A CAT"]) == embed_texts(f"hf:{folder}", ["a cat"])).all()


def test_siglip_reads_what_its_own_tokenizer_makes_of_it(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a cat", "a photo of the dog", "it is a very long way"]),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=50,
        hard_vocab_limit=False,
        bos_id=-1,
        minloglevel=2,
    )
    folder = siglip(tmp_path, transformers.SiglipTokenizer(str(tmp_path / "spiece.model")))
    found = embed_texts(f"hf:{folder}", ["A photo, of Cat!", "a photo of cat", "a photo"])
    assert np.abs(found[0] - found[1]).max() < 1e-6  # case and punctuation are dropped
    assert np.abs(found[0] - found[2]).max() > 1e-3
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ids = [*pieces.encode("a photo of cat"), 2]
    model = transformers.SiglipModel.from_pretrained(folder)
    expected = text_features(model, ids + [2] * (LONGEST - len(ids)))
    assert np.abs(found[1] - expected).max() < 1e-5


def test_a_tokenizer_whose_library_is_missing_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library")

    folder = siglip(tmp_path, gemma("GemmaTokenizer"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unavailable)
    with monkeypatch.context() as patch:
        patch.setattr(extras, "find_spec", lambda name: None if name == "sentencepiece" else 1)
        with pytest.raises(MissingExtraError, match=r"needs sentencepiece: pip install .*export"):
            embed_texts(f"hf:{folder}", TEXTS)
    monkeypatch.setattr(extras, "find_spec", lambda _: 1)
    with pytest.raises(InputError, match=r"tokenizer: SiglipTokenizer requires"):
        embed_texts(f"hf:{folder}", TEXTS)


def test_a_missing_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "torch" else 1)
    for source in ("hf:some/model", "openclip:ViT-B-16/tag"):
        with pytest.raises(MissingExtraError, match=r'needs torch: pip install "regcache\[export'):
            embed_texts(source, TEXTS)


def test_texts_and_images_share_a_space(clip_folder: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    folders: dict[Path, Any] = {
        clip_folder: transformers.CLIPModel,
        siglip(tmp_path, gemma("GemmaTokenizer")): transformers.SiglipModel,
    }
    for folder, model in folders.items():
        reference = open_source(f"hf:{folder}").reference()
        assert reference is not None
        with torch.no_grad():
            features = model.from_pretrained(folder).get_image_features(torch.from_numpy(images))
        expected = features.pooler_output.numpy()
        assert np.abs(reference(images)[0] - expected).max() < 1e-5
        assert embed_texts(f"hf:{folder}", ["cat"]).shape == (1, expected.shape[1])


def test_encoders_without_text_are_refused(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=28))
    model.save_pretrained(tmp_path / "dino")
    vision = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    vision.save_pretrained(tmp_path / "vision")
    (tmp_path / "encoder.onnx").touch()
    for source, what in {
        f"hf:{tmp_path / 'dino'}": "dinov2",
        f"hf:{tmp_path / 'vision'}": "clip_vision_model",
        "timm:vit_base_patch16_siglip_224": "it",
        "sample:dinov2-small": "it",
        str(tmp_path / "encoder.onnx"): "it",
    }.items():
        with pytest.raises(InputError, match=f"{what} has no text encoder; texts need a CLIP"):
            embed_texts(source, TEXTS)


def test_a_checkpoint_without_a_tokenizer_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(InputError, match="comes without the files of its tokenizer"):
        embed_texts(f"hf:{tmp_path}", TEXTS)


def test_a_tokenizer_of_another_model_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    longer = {f"{number}x": number for number in range(500)}
    start, end = {"<|startoftext|>": 500}, {"<|endoftext|>": 501}
    transformers.CLIPTokenizer(vocab=longer | start | end, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="knows more than the 132 tokens of its text encoder"):
        embed_texts(f"hf:{tmp_path}", TEXTS)


def test_bad_arguments_are_one_clear_line(clip_folder: Path) -> None:
    with pytest.raises(InputError, match="no texts"):
        embed_texts(f"hf:{clip_folder}", [])
    with pytest.raises(InputError, match="batch size must be at least 1, not 0"):
        embed_texts(f"hf:{clip_folder}", TEXTS, 0)
    with pytest.raises(InputError, match="is no source"):
        embed_texts("nonsense", TEXTS)
    with pytest.raises(InputError, match="no such folder"):
        embed_texts("hf:./missing", TEXTS)
