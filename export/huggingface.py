"""hf:ID_OR_DIR: vision towers of transformers checkpoints."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from regcache.export.extras import loading_errors, quiet, reason, require
from regcache.export.own_processor import processor_of_transformers
from regcache.export.recipe import at_resolution, from_image_processor
from regcache.export.reference import Processor, Reference
from regcache.export.suggest import suggest_checkpoint
from regcache.export.to_onnx import write_onnx
from regcache.export.tower import Tower, as_reference, check_patches
from regcache.export.vit_families import FAMILIES
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess


@dataclass(frozen=True)
class HuggingFaceSource:
    """A checkpoint on the hub (ID) or in a folder; code that comes with it is never run."""

    name: str
    checkpoint: str

    @classmethod
    def open(cls, text: str, checkpoint: str) -> Self:
        """Raises InputError for a folder that is missing, MissingExtraError for a library."""
        require("exporting hf: sources", "torch", "transformers", "onnxscript")
        folder = Path(checkpoint).expanduser()
        if folder.is_dir():
            return cls(text, str(folder))
        if folder.is_file():
            raise InputError(f"{text}: is a file; did you mean the folder, hf:{folder.parent}?")
        looks_local = checkpoint.startswith((".", "~", os.sep)) or checkpoint.count("/") > 1
        if looks_local or folder.exists():
            raise InputError(f"{text}: no such folder")
        return cls(text, checkpoint)

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the vision tower as ONNX; see Source. None without a preprocessor_config.json.

        Raises InputError when the checkpoint cannot be read or is no supported vision model.
        """
        config = self._config()
        recipe = self._recipe(config, resolution)
        write_onnx(lambda: self._tower(config, recipe, resolution), path)
        return recipe

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """transformers' own model; see Source. Raises InputError as `export` does."""
        config = self._config()
        return as_reference(self._tower(config, self._recipe(config, resolution), resolution))

    def processor(self, *, resolution: int | None = None) -> Processor | None:
        """The checkpoint's own image processor; see Source. Raises InputError as `export` does."""
        config = self._config()
        own = self._own_processor(config)
        if own is None:
            return None
        asked = None if resolution is None else self._recipe(config, resolution)
        return processor_of_transformers(own, asked)

    def read_config(self) -> Any:
        """The configuration of the whole checkpoint. Raises InputError where it cannot be read."""
        from transformers import AutoConfig

        try:
            with quiet():
                return AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            on_hub = isinstance(error, OSError) and not Path(self.checkpoint).is_dir()
            hint = suggest_checkpoint(self.checkpoint) if on_hub else ""
            raise InputError(f"{self.name}: {reason(error)}{hint}") from error

    def load(self, model_class: str, config: Any, **options: Any) -> Any:
        """A model of transformers in float32 and eval mode, `config` being its part of the whole.

        Raises InputError where a weight of it is missing from the checkpoint or cannot be read.
        """
        import torch
        import transformers

        try:
            with quiet():
                model, info = getattr(transformers, model_class).from_pretrained(
                    self.checkpoint,
                    config=config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    weights_only=True,
                    **options,
                )
        except loading_errors() as error:
            raise InputError(f"{self.name}: {reason(error)}") from error
        missing = sorted(key for key in info["missing_keys"] if "mask_token" not in key)
        if missing:
            raise InputError(
                f"{self.name}: the checkpoint lacks {len(missing)} weights, first {missing[0]}"
            )
        return model.eval()

    def _config(self) -> Any:
        """The configuration of the vision tower."""
        config = self.read_config()
        if config.model_type not in FAMILIES:
            raise InputError(
                f"{self.name}: {config.model_type} is not supported; "
                f"supported are {', '.join(FAMILIES)}"
            )
        vision = getattr(config, "vision_config", config)
        if not getattr(vision, "vision_use_head", True):
            raise InputError(f"{self.name}: it has no pooling head, so no pooled embedding")
        if hasattr(config, "projection_dim"):  # CLIP keeps the one that counts at the top
            vision.projection_dim = config.projection_dim
        return vision

    def _recipe(self, config: Any, resolution: int | None) -> Preprocess | None:
        own = self._own_processor(config)
        if own is None:
            return None
        try:
            return at_resolution(from_image_processor(own), resolution)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def _own_processor(self, config: Any) -> Any | None:
        """transformers' image processor of the checkpoint, which resizes with Pillow where it can.

        None without a preprocessor_config.json.
        """
        from transformers import AutoImageProcessor

        try:
            with quiet():
                return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                    self.checkpoint, config=config, backend="pil", trust_remote_code=False
                )
        except (OSError, ValueError, ImportError) as error:
            file = Path(self.checkpoint, "preprocessor_config.json")
            if isinstance(error, OSError) and not file.is_file():
                return None  # the config was read from there a moment ago: there is no recipe
            raise InputError(f"{self.name}: preprocessing: {reason(error)}") from error

    def _tower(self, config: Any, recipe: Preprocess | None, resolution: int | None) -> Tower:
        size = resolution or config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if recipe is not None:
            height, width = recipe.height, recipe.width
        check_patches(self.name, (height, width), (config.patch_size, config.patch_size))
        family = FAMILIES[config.model_type]
        options = {"add_pooling_layer": False} if family.has_unused_pooler else {}
        return family.tower(self.load(family.model_class, config, **options), height, width)
