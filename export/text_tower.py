"""Texts embedded by the model that a vision source belongs to, into the space of its images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regcache.export.extras import loading_errors, quiet, reason, require
from regcache.export.huggingface import HuggingFaceSource
from regcache.export.open_clip_tower import OpenClipSource
from regcache.export.source import open_source
from regcache.passes.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

_Encode = Callable[[list[str]], "Tensor"]
_NO_TEXT = "has no text encoder; texts need a CLIP, OpenCLIP or SigLIP model"
_OLD_BUFFER = "transformer.embeddings.position_ids"


def embed_texts(source: str, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
    """Embed texts by PyTorch: float32 [N, D], not normalised, one row for each text.

    They live in the space of the pooled output that the same `source` exports: projected for CLIP
    and OpenCLIP, pooled for SigLIP. Longer texts than the model reads are cut. The model is loaded
    anew by every call, so embed everything at once.
    Raises InputError for a source without a text encoder, such as DINOv2, one that cannot be read,
    no texts, or a batch size below 1; MissingExtraError where a library is not installed.
    """
    if not texts:
        raise InputError(f"{source}: there are no texts to embed")
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")
    encode = _open_encoder(source)

    import torch  # here, where opening the source has found it installed

    batches = (list(texts[at : at + batch_size]) for at in range(0, len(texts), batch_size))
    with torch.inference_mode():
        return np.concatenate([encode(batch).float().numpy() for batch in batches])


def has_texts(source: str) -> bool:
    """Whether a source has a text encoder that we know, as far as its configuration tells.

    Raises InputError for a source that cannot be read.
    """
    opened = open_source(source)
    if isinstance(opened, HuggingFaceSource):
        return opened.read_config().model_type in _TEXT_FAMILIES
    return isinstance(opened, OpenClipSource)


def _open_encoder(source: str) -> _Encode:
    opened = open_source(source)
    if isinstance(opened, HuggingFaceSource):
        return _open_huggingface(opened)
    if isinstance(opened, OpenClipSource):
        return _open_clip(opened)
    raise InputError(f"{source}: it {_NO_TEXT}")


@dataclass(frozen=True)
class _TextFamily:
    """A transformers text tower; `tokenize`: tokenizer, texts, longest -> the model's inputs."""

    model_class: str
    output: str
    tokenize: "Callable[[Any, list[str], int], dict[str, Tensor]]"


def _clip_tokens(tokenizer: Any, texts: list[str], longest: int) -> "dict[str, Tensor]":
    return dict(
        tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    )


def _siglip_tokens(tokenizer: Any, texts: list[str], longest: int) -> "dict[str, Tensor]":
    """Always padded to the full length and without a mask, as SigLIP was trained.

    SigLIP 2 was trained on lower case too, but the Gemma tokenizer of its checkpoints keeps case.
    """
    if getattr(tokenizer, "do_lower_case", True):
        texts = [text.lower() for text in texts]
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
    )
    return {"input_ids": tokens["input_ids"]}


_TEXT_FAMILIES = {
    "clip": _TextFamily("CLIPTextModelWithProjection", "text_embeds", _clip_tokens),
    "siglip": _TextFamily("SiglipTextModel", "pooler_output", _siglip_tokens),
}


def _open_huggingface(source: HuggingFaceSource) -> _Encode:
    family, config = _text_config(source)
    tokenizer = _load_tokenizer(source)
    model = source.load(family.model_class, config)

    def encode(texts: list[str]) -> "Tensor":
        inputs = family.tokenize(tokenizer, texts, config.max_position_embeddings)
        if int(inputs["input_ids"].max()) >= config.vocab_size:
            raise InputError(
                f"{source.name}: its tokenizer knows more than the {config.vocab_size} tokens "
                "of its text encoder"
            )
        embeddings: Tensor = getattr(model(**inputs), family.output)
        return embeddings

    return encode


def _text_config(source: HuggingFaceSource) -> tuple[_TextFamily, Any]:
    config = source.read_config()
    if config.model_type not in _TEXT_FAMILIES:
        raise InputError(f"{source.name}: {config.model_type} {_NO_TEXT}")
    text = config.text_config
    if hasattr(config, "projection_dim"):  # CLIP keeps the one that counts at the top
        text.projection_dim = config.projection_dim
    return _TEXT_FAMILIES[config.model_type], text


def _load_tokenizer(source: HuggingFaceSource) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.checkpoint, trust_remote_code=False)
    except _opening_errors() as error:
        if isinstance(error, ImportError):  # SigLIP's, which transformers does not depend on
            require(f"the tokenizer of {source.name}", "sentencepiece")
        raise InputError(f"{source.name}: tokenizer: {reason(error)}") from error
    # where its files are missing, transformers makes one up that knows the special tokens alone
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"{source.name}: it comes without the files of its tokenizer")
    return tokenizer


def _open_clip(source: OpenClipSource) -> _Encode:
    from open_clip import get_tokenizer
    from open_clip.model import _build_text_tower

    config, tag = source.configs()
    text = {**config["text_cfg"], "output_tokens": False, "hf_model_pretrained": False}
    try:
        with quiet():
            tokenize = get_tokenizer(source.architecture)
            tower = _build_text_tower(config["embed_dim"], text, config.get("quick_gelu", False))
    except _opening_errors() as error:
        if isinstance(error, ImportError):
            require(f"the tokenizer of {source.name}", "transformers", "sentencepiece")
        raise InputError(f"{source.name}: {reason(error)}") from error
    _load_weights(source, tower, source.checkpoint_file(tag))
    tower.eval()
    return lambda texts: tower(tokenize(texts))


def _load_weights(source: OpenClipSource, tower: "nn.Module", checkpoint: Path) -> None:
    """Put the text encoder's part of a checkpoint of the whole model into `tower`."""
    state = _read_weights(source, checkpoint)
    own = {key.removeprefix("text."): state[key] for key in state if key.startswith("text.")}
    if not own:  # CLIP's own layout: the text encoder lies beside "visual", not in "text"
        parts = {key.partition(".")[0] for key in tower.state_dict()}
        own = {key: state[key] for key in state if key.partition(".")[0] in parts}
    if not own:
        vision = any(key.startswith("visual.") for key in state)
        what = "only a vision tower, no text encoder" if vision else "no weights of open_clip"
        raise InputError(f"{source.name}: {checkpoint.name} holds {what}")
    own.pop(_OLD_BUFFER, None)
    try:
        tower.load_state_dict({key: value.float() for key, value in own.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"{source.name}: {checkpoint.name} does not fit the text encoder of "
            f"{source.architecture}: {' '.join(str(error).split())[:200]}"
        ) from error


def _read_weights(source: OpenClipSource, checkpoint: Path) -> "dict[str, Tensor]":
    """Every tensor of the checkpoint; never unpickles anything but tensors."""
    from open_clip.factory import load_state_dict

    try:
        with quiet():
            state: dict[str, Tensor] = load_state_dict(str(checkpoint), weights_only=True)
    except StopIteration:  # what it raises where there is nothing
        return {}
    except _opening_errors() as error:
        raise InputError(f"{source.name}: {checkpoint.name}: {reason(error)}") from error
    return state


def _opening_errors() -> tuple[type[Exception], ...]:
    """The errors of loading_errors, a missing library, and a checkpoint that is no dictionary."""
    return (*loading_errors(), ImportError, AttributeError)
