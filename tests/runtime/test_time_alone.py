"""A model timed, and run, in a process of its own."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.tiny_source import RECIPE
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.time_alone import Deployed, Timed, embed_alone, least, time_alone

pytestmark = pytest.mark.slow


def test_time_and_outputs(tmp_path: Path) -> None:
    vit, path = TinyVit(Spec(grid=4)), tmp_path / "tiny.onnx"
    onnx.save(vit.model(), path)
    images = vit.images(11).astype(np.float32)
    deployed = Deployed(path, RuntimeName.ONNXRUNTIME, 1, outputs=("pooled",))
    found = embed_alone(deployed, images)
    np.testing.assert_allclose(found, vit.reference(images)[0], rtol=1e-3, atol=1e-3)
    timed = time_alone(deployed, RECIPE, 0.01)
    assert list(timed.milliseconds) == [1, 8]
    assert min(timed.milliseconds.values()) > 0
    assert timed.load_ms > 0
    assert timed.peak_mb is None or timed.peak_mb > 10


def test_the_least_of_some_rounds() -> None:
    rounds = [Timed({1: 3.0, 8: 9.0}, 1.0, None), Timed({1: 2.0, 8: 11.0}, 1.0, None)]
    assert least(rounds) == {1: 2.0, 8: 9.0}


def test_what_fails_there_is_said_here(tmp_path: Path) -> None:
    deployed = Deployed(tmp_path / "no.onnx", RuntimeName.ONNXRUNTIME, 1)
    with pytest.raises(InputError, match=r"no\.onnx"):
        time_alone(deployed, RECIPE, 0.01)
