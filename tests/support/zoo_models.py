"""Random encoders of the released architectures, but shallow, narrow and of few patches.

They have fewer heads, of as many channels. CLIP alone keeps its width.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from safetensors.torch import save_file
from support.torchlib import share_torchlib
from support.zoo import SIDE

from regcache.export.cache import written_whole
from regcache.export.reference import Source
from regcache.export.source import open_source
from regcache.export.timm_name import TimmName
from regcache.export.timm_vit import TimmSource

share_torchlib()

DEPTH = 2
WIDTH, HEADS = 192, 3
"""Half the width of a ViT-S and a quarter of a ViT-B, in heads of their 64 channels."""
NOISE = 0.05
"""Of narrow encoders' weights: attention says as much beside the stream as in the released ones."""


def randomize(module: Any, seed: int = 0, noise: float = 0.02) -> Any:
    """Move every parameter by seeded noise, so that no two are equal and none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return module.eval()


@contextmanager
def seeded() -> Iterator[None]:
    """Make the libraries' own initialisation repeatable."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def save_checkpoint(model: Any, processor: Any, folder: Path) -> Source:
    """A transformers checkpoint in a folder, as a source."""
    if not (folder / "preprocessor_config.json").is_file():
        randomize(model, noise=NOISE).save_pretrained(folder)
        processor.save_pretrained(folder)
    return open_source(f"hf:{folder}")


def _vit_sizes(width: int = WIDTH, heads: int = HEADS, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": DEPTH,
        **more,
    }


def _clip_b16(folder: Path) -> Source:
    """As wide as it is, so that its engine is as large as its file. With a text tower, too."""
    vision = _vit_sizes(768, 12, image_size=SIDE, patch_size=16)
    config = transformers.CLIPConfig(
        text_config=_vit_sizes(64, 2, vocab_size=99),
        vision_config=vision,
        projection_dim=512,
    )
    return save_checkpoint(
        transformers.CLIPModel(config), transformers.CLIPImageProcessorPil(), folder
    )


def _siglip(side: int, width: int, heads: int, patch: int) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        config = transformers.SiglipConfig(
            text_config=_vit_sizes(64, 2, vocab_size=99),
            vision_config=_vit_sizes(width, heads, image_size=side, patch_size=patch),
        )
        processor = transformers.SiglipImageProcessorPil(size={"height": side, "width": side})
        return save_checkpoint(transformers.SiglipModel(config), processor, folder)

    return build


def _dino_processor() -> Any:
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": 256},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _dinov2(swiglu: bool) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        config = transformers.Dinov2Config(
            **_vit_sizes(image_size=518, patch_size=14), use_swiglu_ffn=swiglu
        )
        return save_checkpoint(transformers.Dinov2Model(config), _dino_processor(), folder)

    return build


def _dinov2_registers(folder: Path) -> Source:
    config = transformers.Dinov2WithRegistersConfig(
        **_vit_sizes(image_size=518, patch_size=14), num_register_tokens=4
    )
    return save_checkpoint(transformers.Dinov2WithRegistersModel(config), _dino_processor(), folder)


def _dinov3(gated: bool) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        config = transformers.DINOv3ViTConfig(
            **_vit_sizes(image_size=SIDE, patch_size=16),
            num_register_tokens=4,
            key_bias=False,
            use_gated_mlp=gated,
            hidden_act="silu" if gated else "gelu",
        )
        processor = transformers.DINOv3ViTImageProcessor()
        return save_checkpoint(transformers.DINOv3ViTModel(config), processor, folder)

    return build


def _vit_b16(folder: Path) -> Source:
    config = transformers.ViTConfig(**_vit_sizes(image_size=SIDE))
    model = transformers.ViTForImageClassification(config)
    return save_checkpoint(model, transformers.ViTImageProcessorPil(), folder)


def _deit_s16(folder: Path) -> Source:
    model = transformers.DeiTModel(transformers.DeiTConfig(**_vit_sizes(image_size=SIDE)))
    return save_checkpoint(model, transformers.DeiTImageProcessorPil(), folder)


_TIMM_SIZES: dict[str, Any] = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS}


class UntrainedTimmSource(TimmSource):
    """A timm model as `timm:NAME` gives it, but shallow and with random weights."""

    def _create(self, size: tuple[int, int]) -> Any:
        with seeded():
            model = timm.create_model(self._model.architecture, img_size=size, **_TIMM_SIZES)
            return randomize(model, noise=NOISE)


def _timm(name: str) -> Callable[[Path], Source]:
    return lambda _: UntrainedTimmSource(f"timm:{name}", TimmName(name))


def _shallow_timm(name: str) -> str:
    """Make timm know a model by another name, with fewer blocks and channels; that name."""

    def create(pretrained: bool = False, **options: Any) -> Any:
        sizes = {"img_size": SIDE, **_TIMM_SIZES}
        return timm.create_model(name, pretrained=pretrained, **sizes, **options)

    create.__name__, create.__module__ = f"{name}_shallow", __name__
    if not timm.is_model(create.__name__):
        timm.models.register_model(create)
    return create.__name__


def _open_clip(architecture: str) -> Callable[[Path], Source]:
    """The architecture, shallow and narrow, and a checkpoint file that holds its vision tower."""

    def build(folder: Path) -> Source:
        folder.mkdir(exist_ok=True)
        config = open_clip.get_model_config(architecture)
        vision = config["vision_cfg"]
        vision["image_size"] = SIDE
        if "timm_model_name" in vision:
            vision["timm_model_name"] = _shallow_timm(vision["timm_model_name"])
            config["embed_dim"] = WIDTH  # its tower ends without a projection
        else:
            vision |= {"layers": DEPTH, "width": WIDTH}
        config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
        shallow = folder / f"{architecture}-shallow.json"
        with written_whole(shallow) as partial:
            partial.write_text(json.dumps(config))
        open_clip.add_model_config(shallow)
        weights = folder / "weights.safetensors"
        if not weights.is_file():
            from open_clip.model import _build_vision_tower

            quick = config.get("quick_gelu", False)
            tower = _build_vision_tower(config["embed_dim"], vision, quick)
            randomize(tower, noise=NOISE)
            state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
            with written_whole(weights) as partial:
                save_file(state, partial)
        return open_source(f"openclip:{architecture}-shallow/{weights}")

    return build


FAMILIES: dict[str, Callable[[Path], Source]] = {
    "clip-b16": _clip_b16,
    "siglip-b16": _siglip(SIDE, WIDTH, HEADS, 16),
    "siglip2-so400m14": _siglip(SIDE, 288, 4, 14),  # a quarter of its width
    "dinov2-s14": _dinov2(swiglu=False),
    "dinov2-s14-swiglu": _dinov2(swiglu=True),
    "dinov2-s14-registers": _dinov2_registers,
    "dinov3-s16": _dinov3(gated=False),
    "dinov3-s16plus": _dinov3(gated=True),
    "vit-b16": _vit_b16,
    "deit-s16": _deit_s16,
    "timm-vit-b16": _timm("vit_base_patch16_224"),
    "timm-dinov2-s14-registers": _timm("vit_small_patch14_reg4_dinov2"),
    "timm-siglip-b16": _timm("vit_base_patch16_siglip_224"),
    "timm-deit3-s16": _timm("deit3_small_patch16_224"),
    "openclip-b16": _open_clip("ViT-B-16"),
    "openclip-b16-quickgelu": _open_clip("ViT-B-16-quickgelu"),
    "openclip-siglip-b16": _open_clip("ViT-B-16-SigLIP"),
}
"""By name: a function that takes a folder for the checkpoint and yields the source.

Their images are SIDE x SIDE, but for DINOv2, whose position embeddings are for 518 x 518 as
released and are interpolated.
"""
