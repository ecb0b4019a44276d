"""export/extras.py: how optional libraries are loaded."""

import gc

import pytest

from regcache.export.extras import uncollected


def test_garbage_is_collected_again_after_loading() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()


def test_a_program_that_collects_nothing_stays_so() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
