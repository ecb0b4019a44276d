"""openclip:ARCH/TAG_OR_FILE: vision towers of open_clip."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from regcache.export import timm_vit
from regcache.export.checkpoint import SUFFIXES, check_file, misfit, read_weights
from regcache.export.extras import loading_errors, quiet, reason, require
from regcache.export.library_recipes import open_clip_recipe
from regcache.export.own_processor import processor_of_open_clip
from regcache.export.recipe import at_resolution
from regcache.export.reference import Processor, Reference
from regcache.export.static_forward import freeze_multihead, freeze_tokens
from regcache.export.suggest import did_you_mean
from regcache.export.to_onnx import write_onnx
from regcache.export.tower import Tower, as_reference, check_patches
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "visual."


@dataclass(frozen=True)
class OpenClipSource:
    """An architecture of open_clip with one of its tags, or with a checkpoint file."""

    name: str
    architecture: str
    weights: str

    @classmethod
    def open(cls, text: str, rest: str) -> Self:
        """Raises InputError without ARCH/TAG_OR_FILE, MissingExtraError for a library."""
        require("exporting openclip: sources", "torch", "open_clip", "onnxscript")
        architecture, _, weights = rest.partition("/")
        if not weights:
            raise InputError(f"{text}: expected openclip:ARCH/TAG or openclip:ARCH/FILE")
        return cls(text, architecture, weights)

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the vision tower as ONNX; see Source.

        Raises InputError for an unknown architecture or tag, a checkpoint that cannot be read
        or holds anything but weights, and a tower that is no plain vision transformer.
        """
        config, tag = self.configs()
        recipe = self._recipe(config, tag, resolution)
        write_onnx(lambda: self._tower(config, tag, recipe), path)
        return recipe

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """open_clip's own tower; see Source. Raises InputError as `export` does."""
        config, tag = self.configs()
        return as_reference(self._tower(config, tag, self._recipe(config, tag, resolution)))

    def processor(self, *, resolution: int | None = None) -> Processor | None:
        """open_clip's own transform; see Source. Raises InputError as `export` does."""
        config, tag = self.configs()
        recipe = self._recipe(config, tag, resolution)
        return processor_of_open_clip(tag, (recipe.height, recipe.width))

    def configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """open_clip's description of the architecture, and of the tag ({} for a file).

        Raises InputError for an unknown architecture or tag, and one trained as another.
        """
        import open_clip

        config = open_clip.get_model_config(self.architecture)
        if config is None:
            hint = did_you_mean(self.architecture, open_clip.list_models(), "openclip:")
            raise InputError(
                f"{self.name}: open_clip has no architecture {self.architecture}{hint}"
            )
        tag = open_clip.get_pretrained_cfg(self.architecture, self.weights)
        if not tag and not Path(self.weights).expanduser().is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.architecture)
            if Path(self.weights).suffix in SUFFIXES or os.sep in self.weights:
                check_file(Path(self.weights).expanduser(), self.name)
            hint = did_you_mean(self.weights, tags)
            raise InputError(
                f"{self.name}: {self.weights} is no file and no tag of {self.architecture}{hint}; "
                f"its tags are {', '.join(tags) or 'none'}"
            )
        if tag and tag.get("quick_gelu", False) != config.get("quick_gelu", False):
            other = "with" if tag.get("quick_gelu") else "without"
            raise InputError(
                f"{self.name}: {self.weights} was trained {other} QuickGELU; "
                f"use the architecture {other} -quickgelu in its name"
            )
        return config, tag

    def checkpoint_file(self, tag: dict[str, Any]) -> Path:
        """The file with the weights of the whole model, fetched where there is a tag.

        Raises InputError where it cannot be fetched.
        """
        from open_clip import download_pretrained

        if not tag:
            return Path(self.weights).expanduser()
        try:
            with quiet():
                return Path(download_pretrained(tag))
        except loading_errors() as error:
            raise InputError(f"{self.name}: {reason(error)}") from error

    def _recipe(
        self, config: dict[str, Any], tag: dict[str, Any], resolution: int | None
    ) -> Preprocess:
        try:
            recipe = open_clip_recipe(tag, config["vision_cfg"].get("image_size", 224))
            return at_resolution(recipe, resolution)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _tower(self, config: dict[str, Any], tag: dict[str, Any], recipe: Preprocess) -> Tower:
        size = (recipe.height, recipe.width)
        visual = self._build(config, size)
        plain = _is_plain(visual)
        if not plain:
            self._check_timm(visual)
        patch = visual.conv1.kernel_size if plain else visual.trunk.patch_embed.patch_size
        check_patches(self.name, size, patch)
        self._load(visual, self.checkpoint_file(tag))
        if not plain:
            visual.trunk.set_input_size(size)
        run = _run if plain else _run_timm
        freeze = _freeze if plain else _freeze_timm
        return Tower(
            module=visual.eval().requires_grad_(False),
            outputs=lambda images: run(visual, images),
            freeze=lambda: freeze(visual, *size),
            height=recipe.height,
            width=recipe.width,
        )

    def _check_timm(self, visual: Any) -> None:
        from open_clip.timm_model import TimmModel

        if not isinstance(visual, TimmModel):
            raise InputError(
                f"{self.name}: {self.architecture} is not supported; open_clip's towers must be "
                "plain vision transformers, without attentional pooling or custom blocks"
            )
        timm_vit.check_plain(visual.trunk, self.name)

    def _build(self, config: dict[str, Any], size: tuple[int, int]) -> Any:
        from open_clip.model import _build_vision_tower

        vision = dict(config["vision_cfg"])
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        else:
            vision["image_size"] = size[0] if size[0] == size[1] else size
        try:
            return _build_vision_tower(
                config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False)
            )
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"{self.name}: {reason(error)}") from error

    def _load(self, visual: Any, checkpoint: Path) -> None:
        """Put the tower's part of a checkpoint into `visual`, positions resized to its grid."""
        from open_clip.model import resize_pos_embed

        weights = read_weights(checkpoint, self.name, _PREFIX)
        if not weights:
            raise InputError(f"{self.name}: {checkpoint.name} holds no weights named {_PREFIX}*")
        try:
            resize_pos_embed(weights, SimpleNamespace(visual=visual))
            own = {key.removeprefix(_PREFIX): tensor.float() for key, tensor in weights.items()}
            visual.load_state_dict(own, assign=True)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.name}: {checkpoint.name} does not fit {self.architecture}: {misfit(error)}"
            ) from error


def _is_plain(visual: Any) -> bool:
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type != "none"
        and all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)
    )


def _run(visual: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    """What VisionTransformer.forward does, keeping the class token among the tokens."""
    tokens = visual.transformer(visual._embeds(images))
    if not visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    pooled, _ = visual._global_pool(tokens)
    if visual.final_ln_after_pool:
        pooled = visual.ln_post(pooled)
    return pooled if visual.proj is None else pooled @ visual.proj, tokens


def _run_timm(visual: Any, images: "Tensor") -> "tuple[Tensor, Tensor]":
    tokens = visual.trunk.forward_features(images)
    return visual.head(visual.trunk.forward_head(tokens)), tokens


def _freeze(visual: Any, height: int, width: int) -> None:
    for block in visual.transformer.resblocks:
        freeze_multihead(block.attn)
    table = visual.positional_embedding.clone().unsqueeze(0)
    table[:, 0] += visual.class_embedding
    embed = freeze_tokens(
        visual, lambda images: visual.conv1(images).flatten(2).transpose(1, 2), table
    )
    visual._embeds = lambda images: visual.ln_pre(embed(images))


def _freeze_timm(visual: Any, height: int, width: int) -> None:
    timm_vit.freeze(visual.trunk, height, width)
