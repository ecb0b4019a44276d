"""How much the stages of a compilation look at, by its effort."""

import math
from dataclasses import dataclass

from regcache.compiler.job.effort import Effort

# The fewest images to search with, so that eight are left to decide.
LEAST_IMAGES = 16


@dataclass(frozen=True)
class Breadth:
    """How much a search and the placement look at.

    `images`: the most reference images; `sensitivity`, `screening`: how many of them those steps
    run; `short_list`: settings tried of those that a screen promises something of; `alone`: how
    many sites are quantized alone to measure their damage, for each that may stay float.
    """

    images: int = 48
    sensitivity: int = 4
    screening: int = 4
    short_list: int = 3
    alone: float = 2.5

    @classmethod
    def of(cls, effort: Effort) -> "Breadth":
        """How much each effort looks at: `thorough` more than the fields' defaults."""
        return cls(96, 16, 8, 6, math.inf) if effort is Effort.THOROUGH else cls()

    def sites_alone(self, least_share: float) -> float:
        """The share of all sites, those of most damage, that are quantized alone to measure it.

        `least_share`: of the work, what is to be quantized. At least a twelfth of the sites.
        """
        return (
            min(max(self.alone * (1 - least_share), 1 / 12), 1.0) if self.alone < math.inf else 1.0
        )
