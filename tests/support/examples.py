"""How many random examples a test tries: all of them at night, half of them while one works."""

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, settings

_ALL = os.environ.get("REGCACHE_EXAMPLES") == "all"


def examples(count: int, *, ignore: Sequence[HealthCheck] = ()) -> settings:
    """The settings of a test that is to see `count` examples, however long each takes.

    `ignore`: checks of Hypothesis' own that the test is known not to pass.
    """
    return settings(
        max_examples=count if _ALL else count // 2, deadline=None, suppress_health_check=ignore
    )
