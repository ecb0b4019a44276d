"""How much the stages of a compilation look at, by its effort."""

from dataclasses import dataclass

from regcache.compiler.job.options import Effort

# The fewest images to search with, so that eight are left to decide.
LEAST_IMAGES = 16


@dataclass(frozen=True)
class Breadth:
    """How much a search and the placement look at.

    `images`: the most reference images; `sensitivity`, `screening`: how many of them those steps
    run; `short_list`: settings tried of those that a screen promises something of; `placement`:
    images for ranges where only sensitivity is measured.
    """

    images: int = 48
    sensitivity: int = 4
    screening: int = 4
    short_list: int = 3
    placement: int = 16

    @classmethod
    def of(cls, effort: Effort) -> "Breadth":
        """What an effort looks at."""
        return cls(96, 16, 8, 6, 48) if effort is Effort.THOROUGH else cls()
