"""The planted-sink encoder: the real DINOv2-S with a known outlier, and a known cure, built in.

DINOv2-S/14 at 224 px has no massive patch tokens of its own; `plant` edits a copy of it.

Planted, around block l:
- Three residual channels are taken from the model, which gets their mean instead: S (sink), H
  (hold) and Z, always zero, that the two are read against, so that a norm's mean cancels out.
- Trigger: one hidden unit of block l's MLP fires on flat patches, to `PEAK` where nothing else
  passes 5, and writes S, which becomes massive. It is the register neuron of arXiv 2506.08010.
- Hold: the trigger subtracts H. The position table (made for the size of the images) writes H
  everywhere but at a few positions drawn by the seed, so that no image gets too many sinks.
- Presence, block l: one value dimension of each head carries S of what is attended to into H. No
  token has an S before the MLP of block l, so only a cached sink among the keys has this effect.
- Reader, blocks l and later: one query and key dimension of each head sets how much attention a
  token with a large S gets, mildly, for a sink's emptied key is a magnet of its own.

Natural: all other weights; what looks flat (a direction in the model's own features, fitted to the
contrast of patches); the spread of attention over heads and queries; what later blocks make of it.
The natural fc2 input of blocks 4 to 8 reaches 2.1 to 3.7 times its 99.9th percentile on
photographs: no register can bring it lower. At block 3 the heads see a sink so unevenly that the H
it takes to stop all triggers disturbs the output: plant from block 4 on.

The register is a sink as it leaves block l, the token of largest l-infinity norm, prefixed from
block l or a few blocks before. Planted to be found: the block, the tokens, and that cure.
"""

import copy
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from support.planted_registers import capture_register, prefixed, split_heads
from support.planted_survey import Moments, run_blocks, survey, watch
from torch import Tensor

PEAK = 40.0  # what the trigger unit reaches on a typical sink
_LEVEL = 5.0  # S of a typical sink, in lengths of an ordinary token
_SINK = 0.1  # a sink: a patch whose S is more than this share of a typical sink's
_SHARE, _LATER_SHARE = 0.01, 0.0005  # attention one sink takes, in the planted block and later
_SPREAD = 4  # positions that may become sinks for each that does
_HOLD = 0.05  # H of the other positions, in lengths of a token where tokens are shortest
_RIDGE = 0.2  # of the fit of the trigger, per token
_GAIN = 6.0  # of the norm that shows H to the trigger, over its ordinary gain
_HELD, _PRESENT = 1.5, 3.0  # how far H outweighs the strongest trigger, by position and by presence


@dataclass(frozen=True)
class Planting:
    """What to plant: `share` of the patches become sinks at `block`; `seed` draws the channels."""

    block: int
    share: float = 0.02
    seed: int = 0


def draw_planting(seed: int) -> Planting:
    """Block (4 to 8), share (0.5 to 4 %) and channels at random."""
    draw = random.Random(seed)
    return Planting(draw.randint(4, 8), draw.uniform(0.005, 0.04), seed)


class Channels(NamedTuple):
    """The residual channels that are taken: S, H and Z."""

    sink: int
    hold: int
    zero: int


@dataclass(frozen=True)
class Planted:
    """The planted encoder and the answers."""

    model: Any
    block: int
    unit: int  # the hidden unit that becomes massive
    channels: Channels
    free: Tensor  # the tokens that may become sinks, among 1 + patches
    level: float  # S of a typical sink

    def outputs(self, images: Tensor) -> Tensor:
        """Hidden states after the planted block [N, tokens, width]."""
        return run_blocks(self.model, self.model.embeddings(images), 0, self.block + 1)

    def sink_mask(self, images: Tensor) -> Tensor:
        """Which patches are sinks, as bool [N, patches]; under `prefixed`, which still are."""
        return self.outputs(images)[:, 1:, self.channels.sink] > _SINK * self.level

    def candidate(self, images: Tensor) -> Tensor:
        """The token [width] of largest l-infinity norm after the planted block."""
        return _largest(self.outputs(images))


def plant(model: Any, planting: Planting, images: Tensor) -> Planted:
    """A planted copy of `model`; `images` [N, 3, H, W] set the trigger and all levels."""
    start, new = planting.block, copy.deepcopy(model).requires_grad_(False)
    layers, generator = new.encoder.layer, torch.Generator().manual_seed(planting.seed)
    block, mlp = layers[start], layers[start].mlp

    seen = survey(new, images[::2])  # half is enough for moments
    spread = torch.stack([now["block"].std / now["block"].std.mean() for now in seen]).mean(0)
    channels = Channels(*_draw(spread, 3, generator))
    _clear(new, list(channels), seen)
    patches = (images.shape[-1] // 14) ** 2
    count = round(_SPREAD * planting.share * patches)
    free = 1 + torch.randperm(patches, generator=generator)[:count]
    shortest = min(float(now["block"].length) for now in seen)
    _hold_back(new, channels.hold, free, images, _HOLD * shortest)
    readers = {i: _read_sinks(layers[i], channels, seen[i]) for i in range(start, len(layers))}
    _report_presence(block, channels, seen[start])

    entering = run_blocks(new, new.embeddings(images), 0, start)
    now, act = watch(block, entering), seen[start]["act"]
    unit = _draw(act.std * mlp.fc2.weight.norm(dim=0), 1, generator)[0]
    level = _LEVEL * float(now["block"].norm(dim=-1).median())
    planted = Planted(new, start, unit, channels, free, level)
    mlp.fc2.bias += mlp.fc2.weight[:, unit] * act.mean[unit]
    mlp.fc2.weight[:, unit] = 0
    mlp.fc2.weight[channels.sink, unit] = level / PEAK
    now["norm2"][..., list(channels)] = 0
    wanted = round(planting.share * patches * len(images))
    _trigger(planted, now["norm2"], flattest(images), wanted)
    _settle(planted, readers, entering)
    return planted


def _largest(hidden: Tensor) -> Tensor:
    tokens = hidden.flatten(0, 1)
    return tokens[tokens.abs().amax(1).argmax()]


def _draw(importance: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Different indices at random, out of the less important half."""
    quiet = importance.argsort()[: len(importance) // 2]
    drawn: list[int] = quiet[torch.randperm(len(quiet), generator=generator)[:count]].tolist()
    return drawn


def _weakest(importance: Tensor, heads: int) -> list[int]:
    """The index of each head's least important dimension."""
    size = len(importance) // heads
    return [h * size + int(importance[h * size :][:size].argmin()) for h in range(heads)]


def _clear(model: Any, channels: list[int], seen: list[dict[str, Moments]]) -> None:
    """Take residual channels out of use: nothing writes them, and readers get their mean."""
    embeddings = model.embeddings
    for tensor in (embeddings.cls_token, embeddings.position_embeddings):
        tensor[..., channels] = 0
    writers = [embeddings.patch_embeddings.projection]
    for layer, now in zip(model.encoder.layer, seen, strict=True):
        attention = layer.attention
        writers += [attention.o_proj, layer.mlp.fc2]
        layer.layer_scale1.lambda1[channels] = layer.layer_scale2.lambda1[channels] = 1
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for norm, name, readers in (
            (layer.norm1, "norm1", projections),
            (layer.norm2, "norm2", (layer.mlp.fc1,)),
        ):
            norm.weight[channels] = norm.bias[channels] = 0
            for reader in readers:
                reader.bias += reader.weight[:, channels] @ now[name].mean[channels]
                reader.weight[:, channels] = 0
    for writer in writers:
        writer.weight[channels] = writer.bias[channels] = 0
    model.layernorm.weight[channels] = 0
    model.layernorm.bias[channels] = seen[-1]["class"].mean[channels]


def _hold_back(model: Any, hold: int, free: Tensor, images: Tensor, amount: float) -> None:
    """Write H into all positions but the free ones, in a position table of this image size."""
    embeddings, (height, width) = model.embeddings, images.shape[-2:]
    tokens = embeddings(images[:1])
    table = embeddings.interpolate_pos_encoding(tokens, height, width).clone()
    table[..., hold] = amount
    table[:, free, hold] = 0
    embeddings.position_embeddings = torch.nn.Parameter(table, requires_grad=False)
    model.config.image_size = height


def _read_sinks(layer: Any, channels: Channels, now: dict[str, Moments]) -> list[int]:
    """Let one key dimension of each head read S; `_balance` sets how much the queries care."""
    attention = layer.attention
    most = now["norm1"].peak.max() / 2  # what S may reach after the norm: within nature
    layer.norm1.weight[[channels.sink, channels.zero]] = most / len(layer.norm1.weight) ** 0.5
    dims = _weakest(now["q"].std * now["k"].std, attention.num_attention_heads)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[dims] = projection.bias[dims, None] = 0
    attention.k_proj.weight[dims, channels.sink] = 1 / attention.scaling / most
    attention.k_proj.weight[dims, channels.zero] = -1 / attention.scaling / most
    return dims


def _report_presence(block: Any, channels: Channels, now: dict[str, Moments]) -> None:
    """Let one value dimension of each head carry S into H, at a scale that `_suppress` sets."""
    value, out = block.attention.v_proj, block.attention.o_proj
    block.norm2.weight[[channels.hold, channels.zero]] = _GAIN * block.norm2.weight.abs().median()
    dims = _weakest(now["v"].std * out.weight.norm(dim=0), block.attention.num_attention_heads)
    out.bias += out.weight[:, dims] @ now["v"].mean[dims]
    value.weight[dims] = value.bias[dims, None] = out.weight[:, dims] = 0
    value.weight[dims, channels.sink] = now["v"].peak.max() / now["norm1"].peak.max()
    value.weight[dims, channels.zero] = -value.weight[dims, channels.sink]
    out.weight[channels.hold, dims] = 1


def flattest(images: Tensor) -> Tensor:
    """The quarter of patches [N, 1 + patches] with the least contrast of each image."""
    patches = images.unfold(2, 14, 14).unfold(3, 14, 14).flatten(4)
    contrast = patches.std(dim=-1).mean(1).flatten(1)
    flat = torch.zeros(len(images), 1 + contrast.shape[1], dtype=torch.bool)
    count = contrast.shape[1] // _SPREAD
    return flat.scatter(1, 1 + contrast.topk(count, largest=False).indices, value=True)


def _trigger(planted: Planted, features: Tensor, flat: Tensor, wanted: int) -> None:
    """Make the unit fire on what looks flat, as a sink on `wanted` of the free tokens."""
    x, chosen = features.flatten(0, 1).double(), flat.flatten()
    mean = x.mean(0)
    x = torch.cat([x - mean, torch.ones(len(x), 1)], dim=1)
    gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1])
    target = chosen.double()
    for _ in range(10):  # flat ones are pulled to 1, the others only down to 0 from above
        weights = torch.linalg.solve(gram, x.T @ target)
        score = x @ weights
        target = torch.where(chosen, 1.0, score.clamp(max=0))
    firing = score.view(flat.shape)[:, planted.free].flatten().topk(wanted).values
    slope = PEAK * (1 - _SINK) / (firing.quantile(0.9) - firing[-1])
    fc1, unit = planted.model.encoder.layer[planted.block].mlp.fc1, planted.unit
    fc1.weight[unit] = slope * weights[:-1]
    fc1.bias[unit] = PEAK * _SINK + slope * (weights[-1] - mean @ weights[:-1] - firing[-1])


def _settle(planted: Planted, readers: dict[int, list[int]], hidden: Tensor) -> None:
    """Set how much attention one register gets, block by block, and that it stops the trigger."""
    model, start = planted.model, planted.block
    register = _largest(model.encoder.layer[start](hidden))
    for index, sinks in capture_register(model, register[None], start).items():
        layer = model.encoder.layer[index]
        share = _SHARE if index == start else _LATER_SHARE
        _balance(layer.attention, layer.norm1(hidden), sinks[0], readers[index], share)
        if index == start:
            _suppress(planted, hidden, sinks)
        with prefixed(model, {index: sinks}):
            hidden = layer(hidden)


def _balance(attention: Any, normed: Tensor, key: Tensor, dims: list[int], share: float) -> None:
    """Let one sink take `share` of each head's attention, by a logit added for every query."""
    keys = torch.cat([key.expand(len(normed), -1, -1), attention.k_proj(normed)], dim=1)
    queries = split_heads(attention, attention.q_proj(normed)) * attention.scaling
    logits = queries @ split_heads(attention, keys).transpose(2, 3)
    attention.q_proj.bias[dims] = torch.log(share / logits.softmax(-1)[..., 0].mean((0, 2)))


def _suppress(planted: Planted, hidden: Tensor, sinks: tuple[Tensor, Tensor]) -> None:
    """Subtract H in the trigger, and scale the presence of one register to hold it all back."""
    block, unit = planted.model.encoder.layer[planted.block], planted.unit
    _, hold, zero = planted.channels

    def needed(tokens: Any) -> Tensor:
        now = watch(block, hidden)
        shown = now["norm2"][..., hold] - now["norm2"][..., zero]
        return (now["fc1"][..., unit] / shown)[:, tokens].amax()

    held = torch.ones(hidden.shape[1], dtype=torch.bool)
    held[planted.free] = False
    weight = _HELD * needed(held)
    with prefixed(planted.model, {planted.block: sinks}):
        for _ in range(3):  # a larger H also shortens what the norm shows of it
            block.attention.o_proj.weight[hold] *= _PRESENT * needed(planted.free) / weight
    block.mlp.fc1.weight[unit, hold] = -weight
    block.mlp.fc1.weight[unit, zero] = weight
