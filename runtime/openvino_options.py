"""How OpenVINO runs a model on the CPU, and whether it is installed."""

from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from regcache.passes.errors import MissingExtraError


class InferencePrecision(StrEnum):
    """What OpenVINO computes in where nothing is quantized; auto: what is fastest on the CPU."""

    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"


class Hint(StrEnum):
    """What OpenVINO arranges its threads for: one batch soon, or many images in all."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True)
class OpenVinoOptions:
    """How OpenVINO runs a model.

    `cache`: a folder where compiled models are kept, so that the next start is faster; it is made
    where it is not there.
    """

    precision: InferencePrecision = InferencePrecision.AUTO
    hint: Hint = Hint.LATENCY
    cache: Path | None = None

    def for_model(self, own: InferencePrecision) -> Self:
        """These options, in the precision `own` of the model where the user named none."""
        named = self.precision is not InferencePrecision.AUTO
        return self if named else replace(self, precision=own)

    def properties(self, threads: int | None) -> dict[str, Any]:
        """The options as the dict that OpenVINO's compile_model takes; `threads` None: all CPUs."""
        found: dict[str, Any] = {"PERFORMANCE_HINT": self.hint.value.upper()}
        if threads is not None:
            found["INFERENCE_NUM_THREADS"] = threads
        if self.precision is not InferencePrecision.AUTO:
            found["INFERENCE_PRECISION_HINT"] = self.precision.value
        if self.cache is not None:
            found["CACHE_DIR"] = str(self.cache)
        return found


def computes_bf16() -> bool:
    """Whether this CPU computes in bf16, by what OpenVINO found of it, which has to be installed.

    On others OpenVINO computes in f32 whatever it is asked for.
    """
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


def check_openvino(what: str) -> None:
    """Raise MissingExtraError, for `what` needs it, where OpenVINO is not installed."""
    if not has_openvino():
        raise MissingExtraError(what, extra="openvino", module="openvino")
