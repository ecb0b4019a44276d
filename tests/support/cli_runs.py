"""Runs of the command line on a tiny encoder, and comparison of what they write."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from support.command_line import Outcome
from support.tiny_source import SPEC
from support.tiny_vit import TinyVit

Cli = Callable[..., Outcome]


@dataclass(frozen=True)
class Compiled:
    """A command that ran once for several tests, which leave its files as they are."""

    encoder: Path
    calibration: Path
    artifact: Path
    outcome: Outcome


def assert_same_encoder(rewritten: Path, original: Path) -> None:
    """The same inputs and outputs, and the same numbers for any number of images."""
    one, other = (ort.InferenceSession(path) for path in (rewritten, original))
    names = [item.name for item in other.get_outputs()]
    assert [item.name for item in one.get_outputs()] == names
    assert [item.name for item in one.get_inputs()] == ["pixel_values"]
    for batch in (1, 3):
        feed = {"pixel_values": TinyVit(SPEC).images(batch)}
        for found, wanted in zip(one.run(names, feed), other.run(names, feed), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
