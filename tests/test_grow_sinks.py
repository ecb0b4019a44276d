"""Training that grows sinks, on a tiny encoder; benchmarks/grow_sinks.py does it to DINOv2-S."""

from typing import Any

import pytest
import torch
from support.grown import Growth, grow, largest, look
from support.planted import flattest
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

pytestmark = [pytest.mark.torch, pytest.mark.slow]

GROWTH = Growth(block=1, steps=(100, 3), rates=(2e-2, 1e-4))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14
    )
    encoder: Any = Dinov2Model(config)
    return encoder.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Noise; of an image's 25 patches three are nearly flat and bright, three flat and dark."""
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(12, 25, generator=draw).argsort(1).view(12, 1, 5, 5)
    order = order.repeat_interleave(14, 2).repeat_interleave(14, 3)
    noise = torch.randn(12, 3, 70, 70, generator=draw)
    flat = torch.where(order < 3, 2.0, -2.0) + noise / 100
    return torch.where(order < 6, flat, noise)


@pytest.fixture(scope="module")
def grown(model: Any, images: Tensor) -> Any:
    return grow(model, GROWTH, images, lambda _: None)


def test_sinks_grow_and_the_class_token_is_kept(model: Any, grown: Any, images: Tensor) -> None:
    was, now = look(model, model, GROWTH, images), look(model, grown, GROWTH, images)
    assert was.sinks == 0
    assert was.kept == pytest.approx(1)
    assert now.sinks >= 3
    assert now.sizes[1] > 10
    assert now.kept > 0.9


def test_all_weights_are_trained_in_a_copy(model: Any, grown: Any) -> None:
    pairs = zip(model.named_parameters(), grown.parameters(), strict=True)
    same = [name for (name, old), new in pairs if torch.equal(old, new)]
    assert same == ["embeddings.mask_token"]  # which nothing reads


def test_a_control_learns_what_grew_without_sinks(model: Any, grown: Any, images: Tensor) -> None:
    control = grow(model, GROWTH, images, lambda _: None, teacher=grown)
    now = look(grown, control, GROWTH, images)
    assert now.sinks == 0
    assert now.kept > (1 + look(grown, model, GROWTH, images).kept) / 2  # which has learned nothing


def test_who_is_its_own_teacher_has_nothing_to_learn(model: Any, images: Tensor) -> None:
    few = Growth(block=1, steps=(2, 1))
    control = grow(model, few, images, lambda _: None, teacher=model)
    for old, new in zip(model.parameters(), control.parameters(), strict=True):
        assert torch.allclose(old, new, atol=1e-4)


def test_the_same_seed_grows_the_same(model: Any, images: Tensor) -> None:
    few = Growth(block=1, steps=(2, 1))
    one, two = (grow(model, few, images, lambda _: None).state_dict() for _ in range(2))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_which_patches_become_sinks(images: Tensor) -> None:
    flat = flattest(images)
    assert flat.sum(1).tolist() == [6] * 12
    assert not flat[:, 0].any()  # the class token
    brightness = images.unfold(2, 14, 14).unfold(3, 14, 14).mean((1, 4, 5)).flatten(1)
    assert torch.equal(flat[:, 1:], brightness.abs() > 1)
    sizes = torch.rand(flat.shape)
    sinks = largest(sizes, flat)
    assert sinks.sum(1).tolist() == [3] * 12
    assert not (sinks & ~flat).any()
    least = sizes.masked_fill(~sinks, 2).amin(1)
    assert (least >= sizes.masked_fill(sinks | ~flat, -1).amax(1)).all()
