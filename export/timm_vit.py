"""timm:NAME: plain vision transformers of timm."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from regcache.export.extras import loading_errors, quiet, reason, require
from regcache.export.library_recipes import timm_recipe
from regcache.export.recipe import at_resolution
from regcache.export.source import Reference
from regcache.export.static_forward import freeze_tokens, softmax_attention, split_heads
from regcache.export.to_onnx import write_onnx
from regcache.export.tower import Tower, as_reference
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor

_MODULES = ("vision_transformer", "deit")


@dataclass(frozen=True)
class TimmSource:
    """A pretrained model by the name timm knows it by, such as vit_base_patch16_224."""

    name: str
    model_name: str

    @classmethod
    def open(cls, text: str, model_name: str) -> Self:
        """Raises MissingExtraError when torch or timm is not installed."""
        require("exporting timm: sources", "torch", "timm", "onnxscript")
        return cls(text, model_name)

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the model as ONNX; see Source.

        Raises InputError for a name timm does not know, a model that is no plain vision
        transformer, weights that cannot be fetched, or a resolution it cannot take.
        """
        recipe = self._recipe(resolution)
        write_onnx(lambda: self._tower(recipe), path)
        return recipe

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """timm's own model; see Source. Raises InputError as `export` does."""
        return as_reference(self._tower(self._recipe(resolution)))

    def _recipe(self, resolution: int | None) -> Preprocess:
        import timm
        from timm.models import is_model_in_modules

        try:
            config = timm.get_pretrained_cfg(self.model_name)
        except RuntimeError as error:
            raise InputError(f"{self.name}: {reason(error)}") from error
        if config is None or not timm.is_model(self.model_name):
            raise InputError(f"{self.name}: timm has no model of that name")
        if not is_model_in_modules(self.model_name, _MODULES):
            raise InputError(
                f"{self.name}: {self.model_name} is not supported; "
                f"of timm's models those in {' and '.join(_MODULES)} are"
            )
        try:
            return at_resolution(data_recipe(asdict(config)), resolution)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _tower(self, recipe: Preprocess) -> Tower:
        model = self._create((recipe.height, recipe.width))
        check_plain(model, self.name)
        return Tower(
            module=model.eval(),
            outputs=lambda images: _outputs(model, images),
            freeze=lambda: freeze(model, recipe.height, recipe.width),
            height=recipe.height,
            width=recipe.width,
        )

    def _create(self, size: tuple[int, int]) -> Any:
        import timm

        try:
            with quiet():
                return timm.create_model(self.model_name, pretrained=True, img_size=size)
        except loading_errors() as error:
            raise InputError(f"{self.name}: {reason(error)}") from error


def data_recipe(pretrained_cfg: dict[str, Any]) -> Preprocess:
    """The recipe timm evaluates a model with.

    Raises InputError as `timm_recipe` does.
    """
    from timm.data.config import resolve_data_config

    return timm_recipe(
        resolve_data_config(pretrained_cfg=pretrained_cfg)  # type: ignore[no-untyped-call]
    )


def check_plain(model: Any, name: str) -> None:
    """Raises InputError unless a model is timm's VisionTransformer on plain patches."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed, PatchEmbed):
        raise InputError(
            f"{name}: {type(model).__name__} is not supported; "
            "of timm's models only those built on VisionTransformer with PatchEmbed are"
        )


def _outputs(model: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    tokens = model.forward_features(images)
    return model.forward_head(tokens, pre_logits=True), tokens


def freeze(model: Any, height: int, width: int) -> None:
    """Rewrite a timm VisionTransformer in place so that it traces to a static graph."""
    import torch
    from timm.layers.attention_pool import AttentionPoolLatent

    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if isinstance(module, AttentionPoolLatent):
            _freeze_pool(module)
    patches = model.patch_embed(torch.zeros(1, 3, height, width))
    table = model._pos_embed(torch.zeros_like(patches))  # class, registers and positions alone
    model._pos_embed = freeze_tokens(model, lambda tokens: tokens.flatten(1, -2), table)


def _freeze_pool(pool: Any) -> None:
    """Compute the query of the pooling head once, not once per image."""
    query = pool.q_norm(split_heads(pool.q(pool.latent), pool.num_heads))
    pool.register_buffer("latent_query", query, persistent=False)

    def forward(tokens: "Tensor") -> "Tensor":
        if pool.pos_embed is not None:
            tokens = tokens + pool.pos_embed.unsqueeze(0)
        keys, values = pool.kv(tokens).chunk(2, dim=-1)
        key = pool.k_norm(split_heads(keys, pool.num_heads))
        value = split_heads(values, pool.num_heads)
        pooled: Tensor = pool.proj(softmax_attention(pool.latent_query, key, value, pool.scale))
        if pool.mlp is not None:
            pooled = pooled + pool.mlp(pool.norm(pooled))
        if pool.pool == "token":
            return pooled[:, 0]
        return pooled.mean(1) if pool.pool == "avg" else pooled

    pool.forward = forward
