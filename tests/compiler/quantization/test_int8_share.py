"""Which linears stay float, against the rule said anew over all of them."""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.canonical import canonical_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.quantization.int8_share import Placement, place_int8
from regcache.passes.encoder import Linear, Site
from regcache.passes.find_blocks import view_encoder

SITES = view_encoder(canonical_graph(TinyVit(Spec()).model())).sites
# Shares that float64 holds exactly, so that a site that fits exactly is no matter of rounding.
SHARES = st.integers(0, 64).map(lambda part: part / 64)


def make_site(name: str, *shapes: tuple[int, int]) -> Site:
    linears = []
    for number, shape in enumerate(shapes):
        weight = gs.Constant(f"{name}/{number}", np.zeros(shape, np.float32))
        node = gs.Node("MatMul", name, {}, [gs.Variable("x"), weight], [gs.Variable("y")])
        linears.append(Linear(f"{name}.{number}", node, None))
    return Site(gs.Variable(f"{name}/x"), tuple(linears))


@st.composite
def encoders(draw: st.DrawFn) -> tuple[list[Site], dict[str, float]]:
    """Sites of one to three linears, and damages: none, alike, tiny, or missing altogether."""
    sides = st.integers(1, 6)
    shapes = draw(
        st.lists(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), min_size=1, max_size=9)
    )
    sites = [make_site(f"blocks.{number}", *some) for number, some in enumerate(shapes)]
    damages = st.one_of(st.sampled_from([0.0, 1e-9, 0.5]), st.floats(0, 1, allow_subnormal=False))
    damage = {site.name: draw(damages) for site in sites}
    return sites, {name: one for name, one in damage.items() if draw(st.integers(0, 9))}


def work(site: Site) -> int:
    """Multiply-accumulates for a token."""
    return sum(int(np.prod(linear.matmul.inputs[1].values.shape)) for linear in site.linears)


def wanted_floats(
    sites: Sequence[Site], damage: Mapping[str, float], least: float, rotations: int
) -> list[str]:
    """Again and again the site of most damage for its work, of those the floor has room for."""
    total, chosen = sum(map(work, sites)) + rotations, list[Site]()
    while True:
        spent = sum(map(work, chosen)) + rotations
        able = [
            site
            for site in sites
            if site not in chosen
            and damage.get(site.name, 0.0) > 0
            and Fraction(total - spent - work(site), total) >= Fraction(least)
        ]
        if not able:
            return [site.name for site in chosen]
        chosen.append(max(able, key=lambda site: damage[site.name] / work(site)))


def int8_share(sites: Sequence[Site], left: Sequence[str], rotations: int = 0) -> float:
    total = sum(map(work, sites)) + rotations
    return sum(work(site) for site in sites if site.name not in left) / total


@given(encoder=encoders(), least=SHARES, rotations=st.integers(0, 4))
def test_greedy_by_damage_per_work(
    encoder: tuple[list[Site], dict[str, float]], least: float, rotations: int
) -> None:
    sites, damage = encoder
    total = sum(map(work, sites)) + rotations
    least = min(least, (total - rotations) / total)  # as far as there is room for them at all
    found = place_int8(sites, damage, least, rotations)
    assert list(found.left_float) == wanted_floats(sites, damage, least, rotations)
    assert found.share == pytest.approx(int8_share(sites, found.left_float, rotations))
    assert found.share >= least - 1e-12
    assert not found.pareto or found.pareto[0].share == pytest.approx(1 - rotations / total)
    spare = found.share - least
    for site in sites:
        if site.name not in found.left_float and damage.get(site.name, 0.0) > 0:
            assert work(site) / total > spare - 1e-12  # nothing that would fit is left out


@given(encoder=encoders(), least=SHARES)
def test_the_pareto_points_go_from_all_int8_to_all_float(
    encoder: tuple[list[Site], dict[str, float]], least: float
) -> None:
    sites, damage = encoder
    points = place_int8(sites, damage, least).pareto
    if not damage:
        assert points == ()
        return
    assert (points[0].share, points[0].left_float) == (1, None)
    assert points[0].error == pytest.approx(sum(damage.values()))
    assert (points[-1].share, points[-1].error) == pytest.approx((0, 0), abs=1e-9)
    assert sorted(str(point.left_float) for point in points[1:]) == sorted(s.name for s in sites)
    slopes = []
    for number, (one, other) in enumerate(itertools.pairwise(points), start=1):
        assert 0 <= other.share < one.share
        assert 0 <= other.error <= one.error
        left = [str(point.left_float) for point in points[1 : number + 1]]
        assert other.share == pytest.approx(int8_share(sites, left), abs=1e-9)
        kept = sum(damage.get(site.name, 0.0) for site in sites if site.name not in left)
        assert other.error == pytest.approx(kept, abs=1e-9)
        slopes.append((one.error - other.error) / (one.share - other.share))
    assert all(one >= other - 1e-6 for one, other in itertools.pairwise(slopes))


def test_the_floor_is_kept_and_what_does_not_fit_is_passed_over() -> None:
    sites = [make_site("big", (8, 8)), make_site("small", (2, 4)), make_site("rest", (7, 8))]
    damage = {site.name: one for site, one in zip(sites, (0.9, 0.05, 0.001), strict=True)}
    big, small, rest = (site.name for site in sites)
    assert place_int8(sites, damage, 0.25).left_float == (big, small)
    assert place_int8(sites, damage, 0.6).left_float == (small,)  # 64 of 128 is too much
    assert place_int8(sites, damage, 0.0).left_float == (big, small, rest)
    assert place_int8(sites, damage, 0.99).left_float == ()
    assert place_int8(sites, damage, 0.5).left_float == (big,)
    assert place_int8(sites, damage, 0.5).share == 0.5


@pytest.mark.parametrize("least", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_all_int8_where_no_damage_is_known_or_none_is_done(least: float, known: bool) -> None:
    damage = {site.name: 0.0 for site in SITES} if known else {}
    found = place_int8(SITES, damage, least)
    assert (found.left_float, found.share) == ((), 1)
    assert all(point.error == 0 for point in found.pareto)
    assert bool(found.pareto) is known


def test_everything_may_be_float_and_everything_int8() -> None:
    damage = {site.name: 0.1 + number for number, site in enumerate(SITES)}
    assert place_int8(SITES, damage, 1.0) == Placement((), 1, place_int8(SITES, damage, 0).pareto)
    found = place_int8(SITES, damage, 0.0)
    assert sorted(found.left_float) == sorted(damage)
    assert found.share == 0


def test_a_vits_sites_cost_what_their_weights_hold() -> None:
    """q+k+v 3 parts, out 1, fc1 and fc2 2 each, of 8 a block: most damage per work goes first."""
    names = [site.name for site in SITES[:4]]
    assert names == ["blocks.0.q+k+v", "blocks.0.out", "blocks.0.fc1", "blocks.0.fc2"]
    damage = dict(zip(names, (3.3, 1.0, 2.4, 2.1), strict=True))
    found = place_int8(SITES, damage, 0.5)
    assert found.left_float == tuple(names[i] for i in (2, 0, 3, 1))
    assert found.share == 0.5
    assert place_int8(SITES, damage, 0.75).left_float == (names[2], names[3])
