"""Ranges with registers on pieces of an encoder equal those of the whole encoder, run directly."""

import pytest
from support.workbench_cases import BATCHES, make_case, random_tokens, run_named

from regcache.compiler.curation.screening import Screen, predicted_damage, screened_ranges
from regcache.compiler.curation.setting import Setting
from regcache.passes.find_blocks import view_encoder


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES.values())
def test_screened_ranges_are_those_of_the_whole_encoder(batch: int | None) -> None:
    """Widened to hold 0, as a scale is."""
    case = make_case(batch=batch)
    images = case.study.images.fit[:3]
    for start, end, count in [(1, 3, 4), (0, 1, 0)]:
        tokens = random_tokens(case.vit.spec, count)
        setting = Setting(candidates=tuple(range(count)), start=start, end=end)
        graph = case.placed(setting, tokens)
        sites = [site for site in view_encoder(case.graph).sites if start <= site.block < end]
        observed = run_named(graph, [site.tensor.name for site in sites], images)
        wanted = {
            site.name: max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
            for site, x in zip(sites, observed, strict=True)
        }
        assert screened_ranges(case.held, Screen(tokens, start, end)) == pytest.approx(wanted)


def test_predicted_damage_goes_with_the_square_of_the_range() -> None:
    damage, plain = {"a": 2.0, "b": 3.0, "zero": 5.0}, {"a": 10.0, "b": 4.0, "zero": 0.0}
    assert predicted_damage(damage, plain, {"a": 5.0, "b": 8.0, "zero": 1.0}) == 2 / 4 + 3 * 4
    assert predicted_damage(damage, plain, {"a": 10.0}) == 2
