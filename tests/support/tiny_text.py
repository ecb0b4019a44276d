"""Text models of a few kilobytes, with tokenizers that know letters only and need no network."""

import json
import string
from pathlib import Path
from typing import Any

import open_clip
import transformers
from support import zoo_models

TEXTS = ["a photo of a cat.", "A photo of the Dog", "cat", "it's a " + "very " * 20 + "long way"]
LONGEST = 16
LETTERS = string.ascii_letters + string.digits + ".,'"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}


def clip_vocabulary() -> dict[str, int]:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>"]
    return {piece: number for number, piece in enumerate([*pieces, "<|endoftext|>"])}


def gemma_vocabulary() -> dict[str, int]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS, "▁"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    return {piece: number for number, piece in enumerate(pieces)}


def clip_ids(text: str) -> list[int]:
    """Letter by letter, each word's last letter marked; cut, but never without the end token."""
    vocabulary, ids = clip_vocabulary(), []
    for mark in ".,'":
        text = text.replace(mark, f" {mark} ")
    for word in text.lower().replace("' s", "'s").split():
        ids += [vocabulary[letter] for letter in word[:-1]] + [vocabulary[f"{word[-1]}</w>"]]
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    return [start, *ids[: LONGEST - 2], end]


def gemma_ids(text: str) -> list[int]:
    vocabulary = gemma_vocabulary()
    ids = [vocabulary[letter] for letter in text.lower().replace(" ", "▁")]
    return (ids[: LONGEST - 1] + [1] + [0] * LONGEST)[:LONGEST]


def clip(folder: Path) -> Path:
    vocabulary = clip_vocabulary()
    config = transformers.CLIPConfig(
        text_config={
            **SIZES,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": LONGEST,
            "eos_token_id": vocabulary["<|endoftext|>"],
        },
        vision_config=VISION,
        projection_dim=24,
    )
    with zoo_models.seeded():
        zoo_models.randomize(transformers.CLIPModel(config)).save_pretrained(folder)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def siglip(folder: Path, tokenizer: Any) -> Path:
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": LONGEST}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    with zoo_models.seeded():
        zoo_models.randomize(transformers.SiglipModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gemma(kind: str, **options: Any) -> Any:
    """As SigLIP 2's checkpoints set it, but for a vocabulary of letters and without merges."""
    return getattr(transformers, kind)(
        vocab=gemma_vocabulary(),
        merges=[],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        **options,
    )


def tiny_open_clip(folder: Path, name: str, text: dict[str, Any], **more: Any) -> Any:
    """Teach open_clip a small architecture; returns a random model of it."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **more}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    with zoo_models.seeded():
        return zoo_models.randomize(open_clip.create_model(name, pretrained_text=False))


def open_clip_plain(folder: Path) -> tuple[str, Any]:
    text = {"context_length": LONGEST, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return "tiny-text-clip", tiny_open_clip(folder, "tiny-text-clip", text, quick_gelu=True)


def letters(folder: Path) -> dict[str, Any]:
    """The part of open_clip's configuration that names a tokenizer of transformers."""
    gemma("GemmaTokenizer", model_input_names=["input_ids"]).save_pretrained(folder / "tokenizer")
    return {
        "context_length": LONGEST,
        "hf_tokenizer_name": str(folder / "tokenizer"),
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }


def open_clip_siglip(folder: Path, **more: Any) -> tuple[str, Any]:
    text = {
        **letters(folder),
        "vocab_size": len(gemma_vocabulary()),
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_type": "linear",
        "proj_bias": True,
        "norm_kwargs": {"eps": 1e-6},
        **more,
    }
    return "tiny-text-siglip", tiny_open_clip(folder, "tiny-text-siglip", text, custom_text=True)


def open_clip_roberta(folder: Path) -> tuple[str, Any]:
    """A text encoder of transformers, with dropout, as roberta-ViT-B-32 has it."""
    size = len(gemma_vocabulary())
    config = transformers.RobertaConfig(**SIZES, vocab_size=size, pad_token_id=0)
    config.save_pretrained(folder / "roberta")
    text = {
        **letters(folder),
        "hf_model_name": str(folder / "roberta"),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    }
    return "tiny-text-roberta", tiny_open_clip(folder, "tiny-text-roberta", text)
