"""The damage of one block on pieces of an encoder equals that of the whole, run directly."""

from dataclasses import replace

import numpy as np
import pytest
from support.workbench_cases import assert_errors, make_case

from regcache.compiler.curation.sensitivity import block_damage
from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears


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
    images = case.study.images.fit[:3]

    def damage(names: list[str]) -> float:
        some = replace(step, activations={tensors[name]: scales[tensors[name]] for name in names})
        return float(case.errors(run(some, case.graph).graph, images).mean())

    found = block_damage(case.held, block)
    names = [name for name in tensors if name.startswith(f"blocks.{block}.")]
    assert list(found.sites) == names
    wanted = np.array([damage([name]) for name in found.sites] + [damage(names)])
    assert_errors([*found.sites.values(), found.whole], wanted)
