"""The transformers vision towers that can be exported, and how each is run and frozen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regcache.export.static_forward import freeze_multihead, freeze_tokens, softmax_attention
from regcache.export.tower import Tower

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = "regcache_softmax"


@dataclass(frozen=True)
class Family:
    """One transformers model class.

    `projection`: the convolution that turns patches into tokens, a path inside the model.
    `embeddings`: the module that adds positions and other tokens to what it yields.
    `has_unused_pooler`: its constructor adds one unless told not to.
    `always_interpolates`: positions fit the image without `interpolate_pos_encoding`.
    `run`: model, images [B, 3, H, W] -> pooled [B, D], last_hidden_state [B, T, C].
    """

    model_class: str
    embeddings: str
    projection: str
    run: "Callable[[Any, Tensor], tuple[Tensor, Tensor]]"
    has_unused_pooler: bool = False
    always_interpolates: bool = False

    def tower(self, model: Any, height: int, width: int) -> Tower:
        """`model` at one input size, float32 and in eval mode."""
        return Tower(
            module=model,
            outputs=lambda images: self.run(model, images),
            freeze=lambda: _freeze(self, model, height, width),
            height=height,
            width=width,
        )


def _clip(model: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    vision = model.vision_model
    hidden = vision(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    tokens = vision.post_layernorm(hidden)
    return model.visual_projection(tokens[:, 0]), tokens


def _siglip(model: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    output = model(pixel_values=images, interpolate_pos_encoding=True)
    return output.pooler_output, output.last_hidden_state


def _dino(model: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    output = model(pixel_values=images)
    return output.pooler_output, output.last_hidden_state


def _class_token(model: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    tokens = model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    return tokens[:, 0], tokens


_CONVOLUTION = "embeddings.patch_embeddings.projection"
_CLIP = Family(
    "CLIPVisionModelWithProjection",
    "vision_model.embeddings",
    "vision_model.embeddings.patch_embedding",
    _clip,
)
_SIGLIP = Family("SiglipVisionModel", "embeddings", "embeddings.patch_embedding", _siglip)

FAMILIES: dict[str, Family] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": Family("Dinov2Model", "embeddings", _CONVOLUTION, _dino, always_interpolates=True),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "embeddings", _CONVOLUTION, _dino, always_interpolates=True
    ),
    "dinov3_vit": Family(
        "DINOv3ViTModel",
        "embeddings",
        "embeddings.patch_embeddings",
        _dino,
        always_interpolates=True,
    ),
    "vit": Family("ViTModel", "embeddings", _CONVOLUTION, _class_token, has_unused_pooler=True),
    "deit": Family("DeiTModel", "embeddings", _CONVOLUTION, _class_token, has_unused_pooler=True),
}
"""By the `model_type` of a config.json; SigLIP 2 of fixed resolution calls itself "siglip"."""


def _freeze(family: Family, model: Any, height: int, width: int) -> None:
    """Make positions and rope tables constants, and attention a softmax between two matmuls."""
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    model.set_attn_implementation(_ATTENTION)
    images = torch.zeros(1, 3, height, width)
    _freeze_embeddings(family, model, images)
    if hasattr(model, "rope_embeddings"):
        _freeze_rope(model.rope_embeddings, images)
    if hasattr(model, "head"):
        _freeze_pooling_head(model.head)


def _freeze_embeddings(family: Family, model: Any, images: "Tensor") -> None:
    embeddings = model.get_submodule(family.embeddings)
    projection = model.get_submodule(family.projection)
    # with its patches zeroed, an embedding yields the other tokens and the positions alone
    hook = projection.register_forward_hook(lambda _, __, patches: patches * 0)
    options = {} if family.always_interpolates else {"interpolate_pos_encoding": True}
    table = embeddings(images, **options)
    hook.remove()
    embeddings.forward = freeze_tokens(
        embeddings, lambda pixels: projection(pixels).flatten(2).transpose(1, 2), table
    )


def _freeze_rope(rope: Any, images: "Tensor") -> None:
    for name, table in zip(("cos", "sin"), rope(images), strict=True):
        rope.register_buffer(f"{name}_table", table, persistent=False)
    rope.forward = lambda _: (rope.cos_table, rope.sin_table)


def _freeze_pooling_head(head: Any) -> None:
    """Compute the query of SigLIP's pooling head once, not once per image."""
    freeze_multihead(head.attention, head.probe)

    def forward(tokens: "Tensor") -> "Tensor":
        mixed, _ = head.attention(head.probe, tokens, tokens)
        pooled: Tensor = mixed + head.mlp(head.layernorm(mixed))
        return pooled[:, 0]

    head.forward = forward


def _attend(
    module: Any, query: "Tensor", key: "Tensor", value: "Tensor", *_: Any, **options: Any
) -> "tuple[Tensor, None]":
    """transformers' attention interface: [B, heads, T, d] each -> [B, T, heads, d]."""
    mixed = softmax_attention(query, key, value, options["scaling"])
    return mixed.reshape(*mixed.shape[:2], query.shape[1], -1), None
