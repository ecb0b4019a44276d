"""One small encoder in the forms that other people's exporters write, each a fault of its own kind.

Every `build(path)` writes a file of 2 blocks that takes images of SIDE pixels. Weights are random
and seeded.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from regcache.export.extras import uncollected

SIDE, WIDTH, DEPTH, HEADS = 32, 64, 2, 4
HEAD_WIDTH = WIDTH // HEADS
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def vit(**changes: Any) -> Any:
    """timm's vision transformer, with random weights that are always the same."""
    sizes: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(**sizes, num_heads=HEADS, num_classes=0, **changes).eval()


class Unpacked(nn.Module):
    """Queries, keys and values projected apart, and attention written out by `attend`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.vit, self.attend = vit(), attend

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(pixel_values))
        for block in self.vit.blocks:
            hidden, packed = block.norm1(x), block.attn.qkv
            parts = zip(packed.weight.chunk(3), packed.bias.chunk(3), strict=True)
            qkv = [nn.functional.linear(hidden, weight, bias) for weight, bias in parts]
            x = x + block.attn.proj(self.attend(hidden, *qkv))
            x = x + block.mlp(block.norm2(x))
        normed: Tensor = self.vit.norm(x)
        return normed


def attention(heads: int, head_width: int) -> Attend:
    """By matrix products; one of the two sizes may be -1, left for the runtime to find."""

    def attend(hidden: Tensor, *qkv: Tensor) -> Tensor:
        batch, tokens, width = hidden.shape
        q, k, v = (item.view(batch, tokens, heads, head_width).transpose(1, 2) for item in qkv)
        probs = torch.softmax(q @ k.transpose(-1, -2) / HEAD_WIDTH**0.5, -1)
        return (probs @ v).transpose(1, 2).reshape(batch, tokens, width)

    return attend


def einsum_attention(hidden: Tensor, *qkv: Tensor) -> Tensor:
    """By Einstein's sums."""
    batch, tokens, width = hidden.shape
    q, k, v = (item.view(batch, tokens, HEADS, -1).permute(0, 2, 1, 3) for item in qkv)
    probs = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / HEAD_WIDTH**0.5, -1)
    mixed = torch.einsum("bhij,bhjd->bhid", probs, v)
    return mixed.permute(0, 2, 1, 3).reshape(batch, tokens, width)


class HandRms(nn.Module):
    """RMSNorm in single steps."""

    def __init__(self, width: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class TokensFirst(nn.Module):
    """Two outputs: the embedding is the second."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit.forward_features(pixel_values)
        return tokens, self.vit.forward_head(tokens)


class MiddleBlocks(nn.Module):
    """Class tokens of every block beside one another, as depth and segmentation heads take them."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, found = self.vit._pos_embed(self.vit.patch_embed(pixel_values)), []
        for block in self.vit.blocks:
            x = block(x)
            found.append(self.vit.norm(x)[:, 0])
        return torch.cat(found, -1)


class Halved(nn.Module):
    """A model of half precision in a wrapper of single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit().half()

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.vit(pixel_values.half()).float()
        return found


def torchscript(
    model: nn.Module,
    path: Path,
    opset: int = 17,
    axes: Sequence[str] = ("batch",),
    batch: int = 2,
    outputs: Sequence[str] = ("out",),
) -> None:
    """The TorchScript exporter; `axes` names the input's dynamic dimensions from the front."""
    names = dict(enumerate(axes))
    free = {name: {0: "batch"} for name in outputs}
    dynamic = {"pixel_values": names, **free} if names else None
    with _quiet():
        torch.onnx.export(
            model,
            (torch.randn(batch, 3, SIDE, SIDE),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=[*outputs],
            dynamic_axes=dynamic,
        )


def dynamo(model: nn.Module, path: Path, opset: int = 18) -> None:
    """The exporter by torch.export, with a free batch."""
    with _quiet():
        torch.onnx.export(
            model,
            (torch.randn(2, 3, SIDE, SIDE),),
            path,
            dynamo=True,
            opset_version=opset,
            input_names=["pixel_values"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


def batch_in_reshapes(path: Path) -> None:
    """The label says dynamic, the Reshapes inside say 1."""
    torchscript(vit(), path, axes=(), batch=1)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)


def float16_inside(path: Path) -> None:
    """What ONNX Runtime's converter writes: nodes unsorted, inputs and outputs of FP32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    torchscript(vit(), path)
    with _quiet():
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def optimised(path: Path, model: nn.Module, opset: int) -> None:
    """What ONNX Runtime's transformer optimiser writes: com.microsoft operators."""
    from onnxruntime.transformers import optimizer

    plain = path.with_suffix(".plain.onnx")
    torchscript(model, plain, opset=opset)
    sizes = {"num_heads": HEADS, "hidden_size": WIDTH}
    fused = optimizer.optimize_model(str(plain), model_type="vit", opt_level=1, **sizes)
    fused.save_model_to_file(str(path))
    plain.unlink()


def external_data(path: Path) -> None:
    """Weights in a file of another name, as those past 2 GB have to be."""
    torchscript(vit(), path, opset=18)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


@dataclass(frozen=True)
class Case:
    """How a file is written. `open_size`: whether it leaves height and width open. `half`: whether
    it computes in half precision. `operators`: some that make it what it is."""

    build: Callable[[Path], None]
    open_size: bool = False
    half: bool = False
    operators: tuple[str, ...] = ()


CASES = {
    "all_axes_dynamic": Case(
        lambda path: torchscript(vit(), path, 14, ("batch", "channels", "height", "width")),
        open_size=True,
        operators=("Shape", "ConstantOfShape"),
    ),
    "fixed_batch": Case(lambda path: torchscript(vit(), path, axes=(), batch=1)),
    "fixed_batch_of_8": Case(lambda path: torchscript(vit(), path, axes=(), batch=8)),
    "batch_in_reshapes": Case(batch_in_reshapes),
    "minus_one_heads": Case(lambda path: torchscript(Unpacked(attention(-1, HEAD_WIDTH)), path)),
    "minus_one_head_dim": Case(lambda path: torchscript(Unpacked(attention(HEADS, -1)), path)),
    "einsum": Case(
        lambda path: torchscript(Unpacked(einsum_attention), path), operators=("Einsum",)
    ),
    "tokens_first": Case(
        lambda path: torchscript(TokensFirst(), path, outputs=("tokens", "embedding"))
    ),
    "packed_qkv_torchscript": Case(
        lambda path: torchscript(vit(), path), operators=("Split", "Squeeze")
    ),
    "float16_inside": Case(float16_inside, half=True, operators=("Cast",)),
    "half_module": Case(lambda path: torchscript(Halved(), path), half=True, operators=("Cast",)),
    "ort_optimised_opset17": Case(
        lambda path: optimised(path, Unpacked(attention(HEADS, HEAD_WIDTH)), 17),
        operators=("SkipLayerNormalization", "BiasGelu"),
    ),
    "ort_optimised_opset16": Case(
        lambda path: optimised(path, vit(), 16), operators=("LayerNormalization",)
    ),
    "rms_norm_opset18": Case(lambda path: dynamo(vit(norm_layer=_rms_norm), path)),
    "rms_norm_by_hand": Case(lambda path: torchscript(vit(norm_layer=HandRms), path)),
    "middle_blocks_out": Case(lambda path: torchscript(MiddleBlocks(), path)),
    "external_data": Case(external_data),
}


def _rms_norm(width: int, **_: Any) -> nn.Module:
    return nn.RMSNorm(width)


@contextlib.contextmanager
def _quiet() -> Any:
    with (
        torch.no_grad(),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        uncollected(),
    ):
        yield
