"""The damage of one block on pieces of an encoder equals that of the whole, run directly."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support.workbench_cases import assert_errors, make_case, run_named

from regcache.compiler.curation.sensitivity import block_damage, site_damages
from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears

Floats = NDArray[np.float32]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "quantizer", "batch"),
    [(0, "u8s8", None), (1, "u8s8", None), (2, "u8s8", None), (1, "w4a4", 3)],
)
def test_damage_is_that_of_the_whole_encoder(block: int, quantizer: str, batch: int | None) -> None:
    case = make_case(quantizer=quantizer, batch=batch)
    step = case.step(case.graph)
    assert isinstance(step, QuantizeLinears)
    sites, scales = view_encoder(case.graph).sites, step.activations
    tensors = {site.name: site.tensor.name for site in sites}
    fit = case.study.images.fit

    def damage(names: list[str], images: Floats) -> float:
        some = replace(step, activations={tensors[name]: scales[tensors[name]] for name in names})
        return float(case.errors(run(some, case.graph).graph, images).mean())

    together = block_damage(case.held, block)
    names = [name for name in tensors if name.startswith(f"blocks.{block}.")]
    assert list(together.sites) == names
    for some in (names, names[1:3]):
        alone = site_damages(case.held, some)
        assert list(alone) == some
        wanted = [damage([name], fit[:3]) for name in some] + [damage(names, fit[:1])]
        assert_errors([*alone.values(), together.whole], np.array(wanted))


@pytest.mark.parametrize("block", [0, 2])
def test_a_block_s_damage_is_shared_out_by_the_squared_errors(block: int) -> None:
    case = make_case()
    workbench, found = case.workbench, block_damage(case.held, block)
    assert sum(found.sites.values()) == pytest.approx(found.whole)
    images, stream = case.study.images.fit[:1], workbench.streams[block + 1]
    (plain,) = run_named(case.graph, [stream], images)
    errors = []
    for name in found.sites:
        scales = {name: workbench.scales[name]}
        (rounded,) = run_named(workbench.quantize(case.graph, scales), [stream], images)
        errors.append(np.square(rounded - plain, dtype=np.float64).sum())
    wanted = found.whole * np.array(errors) / np.sum(errors)
    assert_errors(list(found.sites.values()), wanted)
