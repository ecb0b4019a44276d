"""Efforts and presets: what a word stands for where the options themselves are not given."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from regcache.compiler.job.targets import Precision, Simulation
from regcache.passes.errors import InputError

FP4_SHARE = "fp4_share"
"""What `int8_share` may be called where linears are quantized to floats in blocks."""


class RegisterChoice(StrEnum):
    """Whether registers are searched for."""

    AUTO = "auto"
    OFF = "off"


class Effort(StrEnum):
    """How much is tried.

    `fast`: no registers, nothing rotated, and all linears in int8: images are run to calibrate and
    to round. `thorough`: as `balanced`, and the search and the placement look at more.
    """

    FAST = "fast"
    BALANCED = "balanced"
    THOROUGH = "thorough"


class Preference(StrEnum):
    """What decides which linears are quantized: the time that is predicted for a GPU."""

    FASTEST = "fastest"


class Preset(StrEnum):
    """A named bundle of options.

    `fast`: effort `fast`, on 64 images at most. `balanced`: the defaults. `accurate`: effort
    `thorough`, and up to a tenth of the linears' work may stay float; of these two, as much as says
    something with the precision that is asked for.
    """

    FAST = "fast"
    BALANCED = "balanced"
    ACCURATE = "accurate"


_BY_EFFORT: Mapping[Effort, Mapping[str, Any]] = {
    Effort.FAST: {"registers": RegisterChoice.OFF, "rotate": False},
    Effort.BALANCED: {},
    Effort.THOROUGH: {},
}
_BY_PRESET: Mapping[Preset, Mapping[str, Any]] = {
    Preset.FAST: {"effort": Effort.FAST, "max_images": 64},
    Preset.BALANCED: {"effort": Effort.BALANCED},
    Preset.ACCURATE: {"effort": Effort.THOROUGH, "int8_share": 0.9},
}
# What the literature's figures are of, unless told.
_SIMULATED: Mapping[str, Any] = {"rotate": False}
_IMPLIED = frozenset(
    name for bundle in (*_BY_EFFORT.values(), *_BY_PRESET.values()) for name in bundle
)


def fill_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with what their preset and effort imply; None stands for not given.

    Raises ValueError where the preset, the effort, the precision or the simulation is none, and
    InputError where `fp4_share` is given with another precision than nvfp4 and mxfp8.
    """
    given = _with_share(given)
    said = {name: one for name, one in given.items() if name not in _IMPLIED or one is not None}
    if said.get("preset") is not None:
        said = {**_of_preset(said), **said}
    implied = {} if said.get("simulate") is None else _SIMULATED
    return {**implied, **_BY_EFFORT[Effort(said.get("effort", Effort.BALANCED))], **said}


def _with_share(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what `fp4_share` says as `int8_share`."""
    said = dict(given)
    share = said.pop(FP4_SHARE, None)
    if share is None:
        return said
    precision = Precision(said.get("precision", Precision.INT8))
    if precision not in (Precision.NVFP4, Precision.MXFP8):
        raise InputError(
            f"--fp4-share is for --precision nvfp4 and mxfp8: {precision.value} takes --int8-share"
            if precision in (Precision.INT8, Precision.FP8)
            else f"--fp4-share is for --precision nvfp4 and mxfp8, not for {precision.value}"
        )
    if said.get("int8_share") is not None:
        raise InputError("--fp4-share and --int8-share say the same: give one of them")
    return {**said, "int8_share": share}


def _of_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset implies, without what would say nothing beside the options given."""
    bundle = dict(_BY_PRESET[Preset(given["preset"])])
    precision = Precision(given.get("precision", Precision.INT8))
    simulation = None if given.get("simulate") is None else Simulation(given["simulate"])
    by_time = given.get("prefer") is not None
    if by_time or simulation is not None or precision is Precision.W4A16:
        bundle.pop("int8_share", None)  # refused beside them, or meant to be all
    weights = Precision.W4A16 is precision or simulation is Simulation.W4A16
    if not precision.quantizes or weights:
        bundle.pop("int8_share", None)
        if bundle["effort"] is Effort.THOROUGH:
            del bundle["effort"]  # nothing is searched for
    return bundle
