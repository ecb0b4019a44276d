"""How much is looked at, by effort."""

from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.options import Effort


def test_only_thorough_looks_at_more() -> None:
    assert Breadth.of(Effort.FAST) == Breadth.of(Effort.BALANCED) == Breadth()
    more = Breadth.of(Effort.THOROUGH)
    assert all(getattr(more, name) > value for name, value in vars(Breadth()).items())
