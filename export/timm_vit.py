"""timm:NAME and its other forms: plain vision transformers of timm, weights of anybody."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from regcache.export.checkpoint import misfit, read_weights
from regcache.export.extras import loading_errors, quiet, reason, refuse_fetching, require
from regcache.export.library_recipes import timm_recipe
from regcache.export.own_processor import processor_of_timm
from regcache.export.recipe import at_resolution
from regcache.export.reference import Processor, Reference
from regcache.export.static_forward import freeze_tokens, softmax_attention, split_heads
from regcache.export.suggest import did_you_mean, timm_names
from regcache.export.timm_name import TimmName
from regcache.export.timm_saved import SavedModel, find_weights, read_saved
from regcache.export.to_onnx import write_onnx
from regcache.export.tower import Tower, as_reference, check_patches
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor

_MODULES = ("vision_transformer", "deit")
_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class TimmSource:
    """A model that timm knows by name, with its own weights, a file's, a hub's, or random ones."""

    name: str
    wanted: TimmName

    @classmethod
    def open(cls, text: str, rest: str) -> Self:
        """Raises InputError as TimmName does, MissingExtraError without torch or timm."""
        require("exporting timm: sources", "torch", "timm", "onnxscript")
        return cls(text, TimmName.parse(text, rest))

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the model as ONNX; see Source.

        Raises InputError for a name timm does not know, a model that is no plain vision
        transformer, weights that cannot be fetched, read or do not fit, or a resolution it
        cannot take.
        """
        recipe = self._recipe(resolution)
        write_onnx(lambda: self._tower(recipe), path)
        return recipe

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """timm's own model; see Source. Raises InputError as `export` does."""
        return as_reference(self._tower(self._recipe(resolution)))

    def processor(self, *, resolution: int | None = None) -> Processor | None:
        """timm's own transform; see Source. Raises InputError as `export` does."""
        self._recipe(resolution)  # which refuses what cannot be read
        return processor_of_timm(data_config(*self._evaluated(resolution)))

    @cached_property
    def _model(self) -> SavedModel:
        """The model to create; saved models bring arguments besides its name."""
        wanted = self.wanted
        if wanted.model is not None:
            return SavedModel(wanted.model, {}, dict(wanted.options))
        saved = read_saved(wanted, self.name)
        return replace(saved, options={**saved.options, **wanted.options})

    def _recipe(self, resolution: int | None) -> Preprocess:
        config, side = self._evaluated(resolution)
        try:
            return data_recipe(config, side)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            if not self._model.data:
                raise
            raise InputError(f"{self.name}: config.json: {reason(error)}") from error

    def _evaluated(self, resolution: int | None) -> tuple[dict[str, Any], int | None]:
        """The pretrained_cfg to evaluate with, and the side of another input than it says."""
        import timm
        from timm.models import is_model_in_modules

        model = self._model
        name = model.architecture
        try:
            config = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            hint = did_you_mean(name, timm.list_pretrained(f"{name.partition('.')[0]}.*"), "timm:")
            raise InputError(f"{self.name}: {reason(error)}{hint}") from error
        if config is None or not timm.is_model(name):
            hint = did_you_mean(name.partition(".")[0], timm_names(_MODULES), "timm:")
            raise InputError(f"{self.name}: timm has no model of that name{hint}")
        if not is_model_in_modules(name, _MODULES):
            raise InputError(
                f"{self.name}: {name} is not supported; "
                f"of timm's models those in {' and '.join(_MODULES)} are"
            )
        side = self.wanted.options.get("img_size", resolution)
        if resolution is not None and side != resolution:
            raise InputError(f"{self.name}: img_size={side}, but the resolution is {resolution}")
        own = model.options.get("img_size")  # a saved model's, which resizes its positions
        asked = side if side is not None else own
        return model.data or asdict(config), None if asked is None else int(asked)

    def _tower(self, recipe: Preprocess) -> Tower:
        model = self._create((recipe.height, recipe.width))
        check_plain(model, self.name)
        _check_size(model.patch_embed, (recipe.height, recipe.width), self.name)
        if not model.global_pool:
            raise InputError(f"{self.name}: it pools no tokens, so there is no embedding")
        return Tower(
            module=model.eval(),
            outputs=lambda images: _outputs(model, images),
            freeze=lambda: freeze(model, recipe.height, recipe.width),
            height=recipe.height,
            width=recipe.width,
        )

    def _create(self, size: tuple[int, int]) -> Any:
        import timm

        model, origin = self._model, self.wanted.origin
        options: dict[str, Any] = {**model.options, "img_size": size}
        options["pretrained"] = origin != "random"
        fitting = ""
        if origin == "timm":
            _refuse_plain_url(model.architecture, self.name)
        if origin not in {"timm", "random"}:
            place = Path(self.wanted.place) if origin == "file" else None
            file = place or find_weights(self.wanted, self.name)
            weights = _own_weights(read_weights(file, self.name), f"{self.name}: {file.name}")
            own: dict[str, Any] = {"state_dict": weights, "label_offset": 0}
            classes = options.get("num_classes", _classes(weights))
            if classes is not None:  # the head is not exported, but it has to fit
                options["num_classes"] = own["num_classes"] = classes
            options["pretrained_cfg_overlay"] = own
            fitting = f"{file.name} does not fit {model.architecture}: "
        errors: tuple[type[Exception], ...] = (*loading_errors(), AttributeError, IndexError)
        try:
            with quiet(), _repeatable():
                return timm.create_model(model.architecture, **options)
        except errors as error:
            raise InputError(f"{self.name}: {fitting}{misfit(error)}") from error


def data_recipe(pretrained_cfg: dict[str, Any], side: int | None = None) -> Preprocess:
    """The recipe timm evaluates a model with. `side`: of a square input other than its own.

    Raises InputError as `timm_recipe` does, and for a side where the input is not square.
    """
    recipe = at_resolution(timm_recipe(data_config(pretrained_cfg)), side)
    # timm rounds the resize down at every size
    return recipe if side is None else timm_recipe(data_config(pretrained_cfg, side))


def data_config(pretrained_cfg: dict[str, Any], side: int | None = None) -> dict[str, Any]:
    """What timm evaluates a model with, all of it. `side`: as for `data_recipe`."""
    from timm.data.config import resolve_data_config

    data: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
        pretrained_cfg=pretrained_cfg
    )
    return data if side is None else {**data, "input_size": (3, side, side)}


def check_plain(model: Any, name: str) -> None:
    """Raises InputError unless a model is timm's VisionTransformer on plain patches."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed, PatchEmbed):
        raise InputError(
            f"{name}: {type(model).__name__} is not supported; "
            "of timm's models only those built on VisionTransformer with PatchEmbed are"
        )


def _check_size(patches: Any, size: tuple[int, int], name: str) -> None:
    """Raises InputError for images that timm's PatchEmbed refuses or cannot cut into patches."""
    if patches.dynamic_img_pad:
        return
    check_patches(name, size, patches.patch_size)
    if patches.strict_img_size:  # such convolutions drop what is left over
        return
    if any(side % patch for side, patch in zip(size, patches.patch_size, strict=True)):
        (height, width), patch = size, patches.patch_size
        raise InputError(
            f"{name}: with dynamic_img_size {height} x {width} has to be a multiple "
            f"of {patch[0]} x {patch[1]}"
        )


def _own_weights(weights: "dict[str, Tensor]", where: str) -> "dict[str, Tensor]":
    """The weights of the encoder alone, without the prefix that a larger model gives their names.

    Raises InputError where there are several encoders.
    """
    prefixes = [key.removesuffix(_PATCHES) for key in weights if key.endswith(_PATCHES)]
    if len(prefixes) > 1:
        raise InputError(f"{where} holds several encoders: {', '.join(map(repr, prefixes))}")
    if not prefixes or not prefixes[0]:
        return weights  # timm converts what it knows of other layouts
    own = prefixes[0]
    return {key.removeprefix(own): weights[key] for key in weights if key.startswith(own)}


def _refuse_plain_url(architecture: str, name: str) -> None:
    """Raises InputError for weights that are not on the hub, where nothing is to be fetched."""
    import timm

    config = timm.get_pretrained_cfg(architecture)
    if config is not None and config.url and not config.hf_hub_id:
        refuse_fetching(name, str(config.url))


def _classes(weights: "dict[str, Tensor]") -> int | None:
    """How many classes the head has; None in a layout that is not timm's own."""
    if "head.weight" in weights:
        return int(weights["head.weight"].shape[0])
    return 0 if _PATCHES in weights else None


@contextmanager
def _repeatable() -> Iterator[None]:
    """Random weights are the same every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


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
