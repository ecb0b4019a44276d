"""How much is looked at, by effort."""

from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.effort import Effort


def test_only_thorough_looks_at_more() -> None:
    assert Breadth.of(Effort.FAST) == Breadth.of(Effort.BALANCED) == Breadth()
    more = Breadth.of(Effort.THOROUGH)
    assert all(getattr(more, name) > value for name, value in vars(Breadth()).items())


def test_sites_that_may_stay_float_are_quantized_alone() -> None:
    """Those and as many again and more; all of them where a half may stay, or where asked for."""
    plain = Breadth()
    assert plain.sites_alone(0.95) == 2.5 * (1 - 0.95)
    assert plain.sites_alone(1.0) == 1 / 12
    assert plain.sites_alone(0.5) == 1.0
    assert Breadth.of(Effort.THOROUGH).sites_alone(1.0) == 1.0
