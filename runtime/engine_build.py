"""What building an engine yields, whichever library builds it."""

from dataclasses import dataclass

from regcache.runtime.engine_layers import EngineLayer


@dataclass(frozen=True)
class EngineBuild:
    """A serialized engine and how it came about.

    `version`: of the library, which must be the same where the engine is loaded.
    `compute_capabilities`: of the GPUs that run it. `gpu`: the name of the one that it was tuned
    on; None where it was built without a GPU.
    `batch`: the least, the tuned and the largest batch size; all the same where the graph fixes it.
    `layers`: the kernels with their number formats, as the builder listed them; empty where the
    list could not be read. `warnings`: what the builder warned of, one line each.
    `seconds`: parsing and building.
    """

    engine: bytes
    version: str
    compute_capabilities: tuple[str, ...]
    batch: tuple[int, int, int]
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]
    seconds: float
    gpu: str | None = None
