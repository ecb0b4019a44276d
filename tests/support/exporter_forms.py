"""Tiny random encoders of ten families in every form that PyTorch's two exporters write."""

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
import torchvision
import transformers
from support.zoo_models import randomize, seeded
from torch import nn

from regcache.export.extras import uncollected

SIDE, PATCH, WIDTH, HEADS, DEPTH = 32, 8, 64, 2, 2
SHALLOW = 1
"""Blocks of the models in all forms but torchscript's "batch free", which costs the least."""

Exporter = Literal["dynamo", "torchscript"]
BatchForm = Literal["batch 1", "batch 8", "batch free", "all free"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")
BATCH_FORMS: tuple[BatchForm, ...] = ("batch 1", "batch 8", "batch free", "all free")


class Named(nn.Module):
    """A model's named outputs, or what `call` makes of it, as a tuple."""

    def __init__(self, model: nn.Module, call: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.call(self.model, pixel_values)


def _sizes(depth: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": depth,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def _pooled(model: Any, pixels: torch.Tensor) -> Any:
    found = model(pixels)
    return found.pooler_output, found.last_hidden_state


def _clip(depth: int) -> nn.Module:
    config = transformers.CLIPVisionConfig(**_sizes(depth, projection_dim=48))
    model = transformers.CLIPVisionModelWithProjection(config)
    return Named(model, lambda m, x: tuple(m(x).values()))


def _siglip(depth: int) -> nn.Module:
    return Named(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_sizes(depth))), _pooled
    )


def _dinov2(depth: int) -> nn.Module:
    config = transformers.Dinov2Config(**_sizes(depth, mlp_ratio=2))
    return Named(transformers.Dinov2Model(config), _pooled)


def _dinov3(depth: int) -> nn.Module:
    config = transformers.DINOv3ViTConfig(**_sizes(depth, num_register_tokens=4))
    return Named(transformers.DINOv3ViTModel(config), _pooled)


def _vit(depth: int) -> nn.Module:
    return Named(transformers.ViTModel(transformers.ViTConfig(**_sizes(depth))), _pooled)


def _beit(depth: int) -> nn.Module:
    config = transformers.BeitConfig(**_sizes(depth, use_relative_position_bias=True))
    return Named(transformers.BeitModel(config), _pooled)


def _timm(name: str, depth: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH}
    model: nn.Module = timm.create_model(name, depth=depth, num_heads=HEADS, num_classes=0, **sizes)
    return model


def _eva02(depth: int) -> nn.Module:
    return _timm("eva02_tiny_patch14_224", depth)


def _timm_vit(depth: int) -> nn.Module:
    return _timm("vit_tiny_patch16_224", depth)


def _torchvision(depth: int) -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(
        SIDE, PATCH, depth, HEADS, WIDTH, 2 * WIDTH
    )
    return model


def _open_clip(depth: int) -> nn.Module:
    model: nn.Module = open_clip.transformer.VisionTransformer(
        SIDE, PATCH, WIDTH, depth, HEADS, 2.0, output_dim=48
    )
    return model


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "CLIP": _clip,
    "SigLIP": _siglip,
    "DINOv2": _dinov2,
    "DINOv3": _dinov3,
    "ViT": _vit,
    "BEiT": _beit,
    "EVA-02": _eva02,
    "timm ViT": _timm_vit,
    "torchvision ViT": _torchvision,
    "open_clip": _open_clip,
}


@dataclass(frozen=True)
class Form:
    """One cell of the table."""

    family: str
    exporter: Exporter
    batch: BatchForm

    @property
    def depth(self) -> int:
        """How many blocks its model has."""
        deep = (self.exporter, self.batch) == ("torchscript", "batch free")
        return DEPTH if deep else SHALLOW

    def __str__(self) -> str:
        return f"{self.family}, {self.exporter}, {self.batch}"


def all_forms() -> list[Form]:
    return [Form(f, e, b) for f in FAMILIES for e in EXPORTERS for b in BATCH_FORMS]


def model_of(form: Form) -> nn.Module:
    """The seeded random model of a form."""
    with seeded():
        model = FAMILIES[form.family](form.depth)
    module: nn.Module = randomize(model)
    return module


def export(model: nn.Module, form: Form, path: Path) -> str | None:
    """Write the model in that form; the exporter's own complaint where it cannot."""
    batch = {"batch 1": 1, "batch 8": 8}.get(form.batch, 2)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    write = _dynamo if form.exporter == "dynamo" else _torchscript
    try:
        with torch.no_grad(), _quiet(), uncollected():
            write(model, images, form.batch, path)
    except Exception as error:  # whatever an exporter raises
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


def _dynamo(model: nn.Module, images: torch.Tensor, batch: BatchForm, path: Path) -> None:
    dim = partial(torch.export.Dim, min=1)
    shapes: dict[int, Any] | None = None
    if batch == "batch free":
        shapes = {0: dim("batch")}
    elif batch == "all free":
        dynamic = torch.export.Dim.DYNAMIC
        shapes = {0: dynamic, 2: dynamic, 3: dynamic}
    torch.onnx.export(
        model,
        (images,),
        path,
        dynamo=True,
        input_names=["pixel_values"],
        dynamic_shapes=None if shapes is None else (shapes,),
        verbose=False,
    )


def _torchscript(model: nn.Module, images: torch.Tensor, batch: BatchForm, path: Path) -> None:
    axes = {"batch free": ["batch"], "all free": ["batch", "channels", "height", "width"]}
    names = axes.get(batch)
    torch.onnx.export(
        model,
        (images,),
        path,
        dynamo=False,
        opset_version=17,
        input_names=["pixel_values"],
        dynamic_axes=None if names is None else {"pixel_values": dict(enumerate(names))},
    )


@contextlib.contextmanager
def _quiet() -> Any:
    """No chatter, and no fused attention in nn.MultiheadAttention, which neither can export."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
