"""Which linears stay in float, where a share of the multiply-accumulates may."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from regcache.passes.encoder import Site


class ParetoPoint(BaseModel):
    """One trade of int8 share against error: `left_float` is the site that leaves int8 there.

    `share`: of the multiply-accumulates of linears and rotations. `error`: 1 - cosine
    of the outputs that the sites still in int8 make, each measured alone, in sum.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float
    error: float
    left_float: str | None = None


@dataclass(frozen=True)
class Placement:
    """The sites left in float, by name, and the way to them from everything in int8."""

    left_float: tuple[str, ...]
    share: float
    pareto: tuple[ParetoPoint, ...] = ()


def place_int8(
    sites: Sequence[Site],
    damage: Mapping[str, float],
    least_share: float,
    rotations: int = 0,
) -> Placement:
    """Leave the sites in float that do the most damage per multiply-accumulate.

    `damage`: of each site, by name. At least `least_share` of the multiply-accumulates stays int8;
    a site that would go below it is passed over. The Pareto points go on to everything in float;
    there are none where no damage was measured. `rotations`: multiply-accumulates, for one token,
    of products that are float in any case.
    """
    # Every token costs as many.
    cost = {site.name: sum(linear.work for linear in site.linears) for site in sites}
    order = sorted(cost, key=lambda name: -damage.get(name, 0.0) / cost[name])
    total = sum(cost.values()) + rotations
    pareto = (
        [ParetoPoint(share=1 - rotations / total, error=sum(damage.values()))] if damage else []
    )
    for name in order if damage else ():
        before = pareto[-1]
        share, error = before.share - cost[name] / total, before.error - damage.get(name, 0.0)
        pareto.append(ParetoPoint(share=max(share, 0.0), error=max(error, 0.0), left_float=name))
    # A little more, for a share that is read off the Pareto table.
    spare = (1 - least_share + 1e-9) * total - rotations
    left = []
    for name in order:
        if damage.get(name, 0.0) > 0 and cost[name] <= spare:
            left.append(name)
            spare -= cost[name]
    share = 1 - (rotations + sum(cost[name] for name in left)) / total
    return Placement(tuple(left), share, tuple(pareto))
