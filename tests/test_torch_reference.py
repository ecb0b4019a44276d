"""The PyTorch reference of registers and deleted sinks, against hand-written numpy and identities.

By hand: a whole encoder in float64, with and without rotary embeddings. On every family of the
zoo: identities that hold only where axes, scales, blocks and their ends are right.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import zoo
from support.torch_reference import Array, DropPatches, RegisterReference, SpliceTokens, find_tower

from regcache.export.vit_families import FAMILIES

TINY = np.random.default_rng(0).standard_normal((2, 3, 12, 12))
RANGES = [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)]
KINDS = ["dinov2-s14", "dinov3-s16", "clip-b16", "siglip-b16", "timm-vit-b16", "openclip-b16"]

Family = tuple[str, RegisterReference]


def _tiny_model(rotary: bool) -> Any:
    """Three blocks in float64, their weights large enough for attention to be sharp."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 4}
    sizes |= {"num_hidden_layers": 3, "image_size": 12}
    if rotary:
        sizes |= {"intermediate_size": 48, "num_register_tokens": 2, "key_bias": True}
        model: Any = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes))
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.double().train(False)


class ByHand:
    """transformers' DINOv2 or DINOv3 of three tiny blocks, one image at a time, in float64 numpy.

    Streams are [T, C]; `patches` are the positions of a stream's last tokens, which rotate.
    """

    def __init__(self, kind: str) -> None:
        self.rotary = kind == "dinov3_vit"
        self.model = _tiny_model(self.rotary)
        self.reference = RegisterReference(FAMILIES[kind].tower(self.model, 12, 12))
        self.embedded = self.reference.hidden_states(TINY)[0]
        self.prefix = 3 if self.rotary else 1
        self.patches = np.arange(9)
        self.weights = {name: p.detach().numpy() for name, p in self.model.named_parameters()}
        if self.rotary:
            cosines, sines = self.model.rope_embeddings(torch.from_numpy(TINY))
            self.turn = (cosines + 1j * sines)[:, :8].numpy()

    def block(
        self, index: int, x: Array, patches: Array, more: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array, Array]:
        """The stream behind a block, and the block's own K and V [heads, T, head_dim]."""
        name = f"{'model' if self.rotary else 'encoder'}.layer.{index}"
        normed = self._norm(x, f"{name}.norm1")
        names = (f"{name}.attention.{letter}_proj" for letter in "qkv")
        q, k, v = (self._linear(normed, n).reshape(len(x), 2, 16).swapaxes(0, 1) for n in names)
        q, k = self._rotate(q, patches), self._rotate(k, patches)
        more_keys, more_values = more or (k[:, :0], v[:, :0])
        keys, values = np.append(k, more_keys, axis=1), np.append(v, more_values, axis=1)
        powers = np.exp(q @ keys.swapaxes(1, 2) / math.sqrt(16))
        mixed = powers / powers.sum(axis=-1, keepdims=True) @ values
        attended = self._linear(np.hstack([*mixed]), f"{name}.attention.o_proj")
        x = x + attended * self.weights[f"{name}.layer_scale1.lambda1"]
        fc1, fc2 = ("up_proj", "down_proj") if self.rotary else ("fc1", "fc2")
        inner = self._linear(self._norm(x, f"{name}.norm2"), f"{name}.mlp.{fc1}")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        outer = self._linear(inner, f"{name}.mlp.{fc2}")
        return x + outer * self.weights[f"{name}.layer_scale2.lambda1"], k, v

    def head(self, x: Array) -> Array:
        return self._norm(x, "norm" if self.rotary else "layernorm")

    def _rotate(self, x: Array, patches: Array) -> Array:
        """Turn the last tokens' pairs (i, i + 8) as complex numbers."""
        if not self.rotary:
            return x
        first = x.shape[1] - len(patches)
        turned = (x[:, first:, :8] + 1j * x[:, first:, 8:]) * self.turn[patches]
        pairs = np.concatenate([turned.real, turned.imag], axis=2)
        return np.concatenate([x[:, :first], pairs], axis=1)

    def _linear(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"])

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt(x.var(axis=1, keepdims=True) + self.model.config.layer_norm_eps)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return np.asarray(centred / deviation * weight + bias)


@pytest.fixture(scope="module", params=["dinov2", "dinov3_vit"])
def by_hand(request: pytest.FixtureRequest) -> ByHand:
    return ByHand(request.param)


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def assert_close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_kv_by_hand(by_hand: ByHand, start: int, end: int) -> None:
    keys, values = random(end - start, 2, 4, 16), random(end - start, 2, 4, 16)[:, :, ::-1]
    pooled, hidden = by_hand.reference.run_kv(TINY, start, end, keys, values)
    for image in range(len(TINY)):
        x = by_hand.embedded[image]
        for block in range(3):
            inside = start <= block < end
            more = (keys[block - start], values[block - start]) if inside else None
            x, _, _ = by_hand.block(block, x, by_hand.patches, more)
        assert_close(hidden[image], by_hand.head(x))
        assert_close(pooled[image], by_hand.head(x)[0])


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_tokens_by_hand(by_hand: ByHand, start: int, end: int) -> None:
    tokens = random(4, 32)
    _, hidden = by_hand.reference.run_tokens(TINY, start, end, tokens)
    for image in range(len(TINY)):
        x = by_hand.embedded[image]
        for block in range(3):
            # behind the class token: where they stand makes no difference
            x = np.concatenate([x[:1], tokens, x[1:]]) if block == start else x
            x, _, _ = by_hand.block(block, x, by_hand.patches)
            x = np.delete(x, np.arange(1, 5), axis=0) if block + 1 == end else x
        assert_close(hidden[image], by_hand.head(x))


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_capture_by_hand(by_hand: ByHand, start: int, end: int) -> None:
    x = tokens = random(5, 32)
    found = by_hand.reference.capture(tokens, start, end)
    assert found[0].shape == found[1].shape == (end - start, 2, 5, 16)
    for block in range(start, end):
        x, *wanted = by_hand.block(block, x, by_hand.patches[:0])
        assert_close([item[block - start] for item in found], wanted)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_without_by_hand(by_hand: ByHand, block: int) -> None:
    run = by_hand.reference.run_without(TINY, block, 4, by_hand.prefix)
    for image in range(len(TINY)):
        x, patches = by_hand.embedded[image], by_hand.patches
        for index in range(3):
            if index == block:
                norms = np.abs(x[by_hand.prefix :]).max(axis=1)
                patches = np.array(sorted(sorted(patches, key=lambda p: norms[p])[:5]))
                x = np.concatenate([x[: by_hand.prefix], x[by_hand.prefix + patches]])
            x, _, _ = by_hand.block(index, x, patches)
        assert run.kept[image].tolist() == patches.tolist()
        assert_close(run.hidden[image], by_hand.head(x))
        assert_close(run.pooled[image], by_hand.head(x)[0])


def test_a_frozen_tower_and_bad_ranges_are_refused(by_hand: ByHand) -> None:
    for start, end in ((0, 0), (0, 4), (-1, 2)):
        with pytest.raises(ValueError, match="no blocks"):
            by_hand.reference.run_tokens(TINY, start, end, random(1, 32))
    with pytest.raises(ValueError, match="of shape"):
        by_hand.reference.run_kv(TINY, 0, 2, random(1, 2, 4, 16), random(1, 2, 4, 16))
    frozen = FAMILIES["dinov2"].tower(_tiny_model(rotary=False), 12, 12)
    frozen.freeze()
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        RegisterReference(frozen)


@pytest.fixture(scope="module", params=zoo.family_params())
def family(request: pytest.FixtureRequest, folder: Path) -> Family:
    """Module-scoped, so that pytest keeps one model at a time; of deep ones three blocks."""
    tower = find_tower(zoo.family_source(request.param, folder), zoo.SIDE)
    for part in tower.module.modules():
        if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential) and len(part) == 12:
            del part[3:]
    return request.param, RegisterReference(tower)


def images(batch: int) -> Array:
    shape = (batch, 3, zoo.SIDE, zoo.SIDE)
    return np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)


def gaps(found: list[Array], wanted: list[Array]) -> list[float]:
    """The largest difference of each output, relative to the largest number wanted."""
    pairs = list(zip(found, wanted, strict=True))
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return [np.abs(ours - theirs).max() / np.abs(theirs).max() for ours, theirs in pairs]


def assert_same(found: list[Array], wanted: list[Array]) -> None:
    assert max(gaps(found, wanted)) <= 2e-5


def assert_differ(one: list[Array], other: list[Array]) -> None:
    assert min(gaps(one, other)) > 1e-4


def prefix_tokens(tokens: int) -> int:
    """What is left of the sequence besides the patches, of 16 or 14 pixels a side."""
    few, many = ((zoo.SIDE // patch) ** 2 for patch in (16, 14))
    return tokens - (many if tokens >= many else few)


@pytest.mark.parametrize("name", KINDS)
def test_run_is_the_sources_reference(name: str, folder: Path) -> None:
    source = zoo.family_source(name, folder)
    reference = RegisterReference(find_tower(source, zoo.SIDE))
    plain = source.reference(resolution=zoo.SIDE)
    assert plain is not None
    assert_same(reference.run(images(2)), plain(images(2)))
    streams, width = reference.hidden_states(images(1)), reference.heads * reference.head_dim
    assert len(streams) == len(reference.blocks) + 1
    assert {stream.shape for stream in streams} == {(1, streams[0].shape[1], width)}


def test_nothing_changes_nothing(family: Family) -> None:
    _, reference = family
    wanted, width = reference.run(images(2)), reference.heads * reference.head_dim
    assert_same(reference.run_tokens(images(2), 0, 2, np.zeros((0, width))), wanted)
    wanted = reference.run(images(1))
    none = reference.capture(np.zeros((0, width)), 0, 2)
    assert none[0].shape == (2, reference.heads, 0, reference.head_dim)
    assert_same(reference.run_kv(images(1), 0, 2, *none), wanted)
    run = reference.run_without(images(1), 1, 0, prefix_tokens(wanted[1].shape[1]))
    assert_same([run.pooled, run.hidden], wanted)
    # and no hook is left behind
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in reference.blocks)


def test_everything_doubled_changes_nothing(family: Family) -> None:
    """An image's own tokens as its registers, in any order: each attention sees all of it twice."""
    name, reference = family
    if "dinov3" in name:
        pytest.skip("registers are not rotated, patches are")
    wanted, streams = reference.run(images(1)), reference.hidden_states(images(1))
    start, end = 1, len(reference.blocks)
    assert_same(reference.run_tokens(images(1), start, end, streams[start][0, ::-1]), wanted)
    kv = reference.capture(streams[0][0, ::-1], 0, end)
    assert_same(reference.run_kv(images(1), 0, end, *kv), wanted)


def test_over_one_block_a_token_is_its_key_and_value(family: Family) -> None:
    _, reference = family
    tokens = 3 * random(4, reference.heads * reference.head_dim)
    plain, last = reference.run(images(1)), len(reference.blocks) - 1
    with_tokens = reference.run_tokens(images(1), last, last + 1, tokens)
    kv = reference.capture(tokens, last, last + 1)
    assert_same(with_tokens, reference.run_kv(images(1), last, last + 1, *kv))
    assert_differ(with_tokens, plain)


def test_registers_have_no_order_and_pairs_share_their_value(family: Family) -> None:
    _, reference = family
    shape = (2, reference.heads, 5, reference.head_dim)
    keys, values = random(*shape), random(*shape)[:, :, ::-1] + 1
    wanted = reference.run_kv(images(1), 0, 2, keys, values)
    order = [3, 0, 4, 2, 1]
    assert_same(reference.run_kv(images(1), 0, 2, keys[:, :, order], values[:, :, order]), wanted)
    assert_differ(reference.run_kv(images(1), 0, 2, keys, values[:, :, order]), wanted)
    for block in (0, 1):  # each block has its own
        other = values.copy()
        other[block] = 0
        assert_differ(reference.run_kv(images(1), 0, 2, keys, other), wanted)
    keys[:, :, 3] = keys[:, :, 1]
    wanted = reference.run_kv(images(1), 0, 2, keys, values)
    shared = values.copy()
    shared[:, :, [1, 3]] = values[:, :, [1, 3]].mean(axis=2, keepdims=True)
    assert_same(reference.run_kv(images(1), 0, 2, keys, shared), wanted)


def test_dropped_patches_put_back_as_tokens(family: Family) -> None:
    name, reference = family
    stream = reference.hidden_states(images(1))[1][0]
    prefix = prefix_tokens(len(stream))
    run = reference.run_without(images(1), 1, 5, prefix)
    by_norm = np.abs(stream[prefix:]).max(axis=1).argsort()
    assert run.kept[0].tolist() == sorted(by_norm[:-5])
    plain = reference.run(images(1))
    assert run.hidden.shape == (1, len(stream) - 5, plain[1].shape[2])
    assert np.abs(run.pooled - plain[0]).max() > 1e-6
    if "dinov3" in name:
        return  # they would come back without their rotation
    back = SpliceTokens(1, len(reference.blocks), torch.from_numpy(stream[prefix + by_norm[-5:]]))
    _, hidden = reference.run_edited(images(1), DropPatches(1, 5, prefix), back)
    assert_same([hidden], [plain[1][:, [*range(prefix), *(prefix + run.kept[0])]]])
