"""The planted-sink encoder keeps what its docstring promises, on photographs it was not made with.

Left halves of the photographs plant, right halves evaluate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from support.planted import Planting, draw_planting, plant
from support.planted_photos import halves, natural, planted
from support.planted_registers import capture_register, prefixed
from torch import Tensor
from torch.nn import functional

pytestmark = [pytest.mark.sample, pytest.mark.xdist_group("planted")]

PLANTINGS = [Planting(block=5, seed=2), draw_planting(2), draw_planting(6)]
Ranges = dict[str, tuple[float, float]]


def calibration() -> Tensor:
    return halves(0, 5)


def evaluation() -> Tensor:
    return halves(1, 9)


@cache
def register(planting: Planting) -> Tensor:
    """One candidate, out of the calibration images."""
    return planted(planting).candidate(calibration())[None]


def measure(model: Any, *blocks: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Pooled outputs of the evaluation images and what enters fc2 of `blocks`."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        return lambda _, inputs: found.__setitem__(block, inputs[0].abs())

    fc2 = {block: model.encoder.layer[block].mlp.fc2 for block in blocks}
    hooks = [module.register_forward_pre_hook(keep(block)) for block, module in fc2.items()]
    pooled = model(evaluation()).pooler_output
    for hook in hooks:
        hook.remove()
    return pooled, found


@cache
def natural_measure() -> tuple[Tensor, dict[int, Tensor]]:
    return measure(natural(), *(planting.block for planting in PLANTINGS))


@cache
def planted_measure(planting: Planting) -> tuple[Tensor, Tensor]:
    pooled, hidden = measure(planted(planting).model, planting.block)
    return pooled, hidden[planting.block]


@cache
def planted_mask(planting: Planting) -> Tensor:
    return planted(planting).sink_mask(evaluation())


def percentile(hidden: Tensor) -> float:
    return float(hidden.flatten().kthvalue(int(0.999 * hidden.numel())).values)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a, b).mean())


@pytest.mark.parametrize("planting", PLANTINGS, ids=str)
def test_one_register_removes_the_planted_sinks(planting: Planting) -> None:
    found, block = planted(planting), planting.block
    pooled, hidden = planted_measure(planting)
    natural_pooled, natural_hidden = natural_measure()[0], natural_measure()[1][block]
    assert hidden.argmax() % hidden.shape[-1] == found.unit
    assert hidden.max() >= 10 * percentile(hidden)
    assert cosine(pooled, natural_pooled) >= 0.95
    share = float(planted_mask(planting).float().mean())
    assert planting.share / 2 <= share <= planting.share * 2

    with prefixed(found.model, capture_register(found.model, register(planting), block)):
        cured, entering = measure(found.model, block)
        assert not found.sink_mask(evaluation()).any()
    calm = entering[block]
    assert calm[..., found.unit].max() < 0.1 * percentile(calm)
    # the natural block is above 2 x its percentile on its own: it may not get worse
    assert calm.max() / percentile(calm) <= 1.25 * natural_hidden.max() / percentile(natural_hidden)
    assert cosine(cured, pooled) >= 0.95
    assert cosine(cured, natural_pooled) >= 0.95


@pytest.mark.parametrize("earlier", [1, 3])
def test_a_register_may_come_blocks_before(earlier: int) -> None:
    """As the paper inserts it."""
    found = planted(PLANTINGS[0])
    prefix = capture_register(found.model, register(PLANTINGS[0]), found.block - earlier)
    with prefixed(found.model, prefix):
        assert not found.sink_mask(evaluation()).any()


def test_a_register_after_the_planted_block_comes_too_late() -> None:
    planting = PLANTINGS[0]
    found = planted(planting)
    before = planted_mask(planting)
    with prefixed(
        found.model, capture_register(found.model, register(planting), planting.block + 1)
    ):
        assert torch.equal(found.sink_mask(evaluation()), before)


def test_sinks_are_flat_and_alike() -> None:
    found = planted(PLANTINGS[0])
    images = evaluation()
    mask, tokens = planted_mask(PLANTINGS[0]), found.outputs(images)[:, 1:]
    contrast = images.unfold(2, 14, 14).unfold(3, 14, 14).flatten(4).std(-1).mean(1).flatten(1)
    assert contrast[mask].median() < 0.5 * contrast.median()
    alike = functional.normalize(tokens[mask], dim=-1)
    assert (alike @ alike.T).mean() > 0.75
    others = functional.normalize(tokens[~mask][::50], dim=-1)
    assert (others @ others.T).mean() < 0.6


def test_planting_leaves_the_model_alone_and_repeats_itself() -> None:
    before = {name: weight.clone() for name, weight in natural().state_dict().items()}
    twice = [plant(natural(), Planting(4, seed=7), calibration()[:2]) for _ in range(2)]
    after = natural().state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    one, other = (found.model.state_dict() for found in twice)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def linears(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def ranges_of(model: Any, images: Tensor) -> Ranges:
    """The least and the largest input of every linear."""
    found: Ranges = {}

    def record(name: str) -> Any:
        return lambda _, inputs: found.update({name: (inputs[0].min(), inputs[0].max())})

    hooks = [
        linear.register_forward_pre_hook(record(name)) for name, linear in linears(model).items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def int8(model: Any, ranges: Ranges) -> Iterator[None]:
    """Min-max int8: inputs of linears per tensor, weights per output channel."""
    weights = {name: linear.weight.data for name, linear in linears(model).items()}

    def rounded(name: str) -> Any:
        low, high = ranges[name]
        step = (high - low) / 255
        lowest = torch.as_tensor(low / step).round()  # so that zero stays zero
        return lambda _, inputs: (inputs[0] / step).round().clamp(lowest, lowest + 255) * step

    hooks = []
    for name, linear in linears(model).items():
        step = linear.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        linear.weight.data = (linear.weight.data / step).round() * step
        hooks.append(linear.register_forward_pre_hook(rounded(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, linear in linears(model).items():
            linear.weight.data = weights[name]


def damage(model: Any, pooled: Tensor) -> float:
    """1 - cosine of the model in min-max int8 to `pooled`, its own in float."""
    with int8(model, ranges_of(model, calibration()[::2])):
        return 1 - cosine(measure(model)[0], pooled)


def test_the_register_undoes_the_damage_to_int8() -> None:
    planting = PLANTINGS[0]
    found = planted(planting)
    without = damage(natural(), natural_measure()[0])
    sinks = damage(found.model, planted_measure(planting)[0])
    with prefixed(found.model, capture_register(found.model, register(planting), planting.block)):
        cured = damage(found.model, measure(found.model)[0])
    print(f"1 - cosine: natural {without:.4f}, planted {sinks:.4f}, with register {cured:.4f}")
    assert sinks > 2 * without
    assert sinks - cured >= 0.8 * (sinks - without)
