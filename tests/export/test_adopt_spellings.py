"""Norms, products and heads in the spellings of real models, by both of PyTorch's exporters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.exporter_cell import measure_file
from support.exporter_forms import DEPTH, HEADS, PATCH, SIDE, WIDTH, Form, Named, export
from support.zoo_models import randomize, seeded
from torch import Tensor, nn
from torch.nn import functional

TOKENS, HEAD = (SIDE // PATCH) ** 2, WIDTH // HEADS


class Block(nn.Module):
    def __init__(
        self,
        attention: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module],
        mlp: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(WIDTH), attention()
        self.norm2, self.mlp = norm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A pre-norm transformer of the attention, norm and feed-forward layer that are given."""

    def __init__(
        self,
        attention: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module],
        mlp: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(attention, norm, mlp) for _ in range(DEPTH)))
        self.norm = norm(WIDTH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        tokens: Tensor = self.norm(self.blocks(x))
        return tokens.mean(1)


class LlamaNorm(nn.Module):
    """Computed in FLOAT whatever comes in, its weight applied behind the cast back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normal.to(x.dtype)


class GemmaNorm(LlamaNorm):
    """Its weight is what is added to 1."""

    def forward(self, x: Tensor) -> Tensor:
        normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normal * (1.0 + self.weight.float())).type_as(x)


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class QwenAttention(nn.Module):
    """Packed, heads behind tokens while they are rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        angles = torch.arange(TOKENS)[:, None, None] / torch.arange(1, HEAD + 1)
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        swapped = torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), -1)
        return x * self.cosines + swapped * self.sines  # type: ignore[operator]

    def forward(self, x: Tensor) -> Any:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, HEAD).unbind(2)
        q, k, v = (item.transpose(1, 2) for item in (self.turn(q), self.turn(k), v))
        weights = torch.softmax(q @ k.transpose(2, 3) * HEAD**-0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class EinsumAttention(nn.Module):
    """Projections by head and products, all of them einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, WIDTH, HEADS, HEAD) * WIDTH**-0.5)
        self.biases = nn.Parameter(torch.randn(3, HEADS, HEAD))
        self.out = nn.Parameter(torch.randn(HEADS, HEAD, WIDTH) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("btc,chd->bthd", x, self.weights[i]) + self.biases[i] for i in range(3)
        )
        weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q * HEAD**-0.5, k), -1)
        return torch.einsum("bthd,hdc->btc", torch.einsum("bhts,bshd->bthd", weights, v), self.out)


def aimv2() -> nn.Module:
    config = transformers.Aimv2VisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=HEADS,
        num_hidden_layers=DEPTH, image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    return Named(transformers.Aimv2VisionModel(config), lambda m, x: m(x).pooler_output)


def intern_vit() -> nn.Module:
    """RMS norms of the queries and keys of all heads together, too."""
    config = transformers.InternVLVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=HEADS,
        num_hidden_layers=DEPTH, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH],
        norm_type="rms_norm", use_qk_norm=True,
    )  # fmt: skip
    return Named(
        transformers.InternVLVisionModel(config), lambda m, x: m(x).last_hidden_state.mean(1)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "AIMv2": aimv2,
    "InternViT": intern_vit,
    "Qwen's tower": lambda: Encoder(QwenAttention, LlamaNorm, GatedMlp),
    "einsum": lambda: Encoder(EinsumAttention, GemmaNorm, plain_mlp),
}


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        *((name, "torchscript") for name in MODELS),
        ("AIMv2", "dynamo"),
        ("Qwen's tower", "dynamo"),
    ],
)
def test_compiles_to_integers(name: str, exporter: Any, tmp_path: Path) -> None:
    with seeded():
        model = MODELS[name]()
    path = tmp_path / "original.onnx"
    assert export(randomize(model), Form(name, exporter, "batch free"), path) is None
    cell = measure_file(path, tmp_path)
    assert cell.good, cell
    assert cell.batch == "batch"
