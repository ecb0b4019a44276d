"""What an artifact is compared with: its PyTorch original, or the float ONNX inside it."""

import importlib.util
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.parity.comparison import Encoder
from regcache.compiler.reporter import Reporter
from regcache.export.extras import quiet, uncollected, unfetched
from regcache.export.reference import Processor
from regcache.export.source import is_on_hub, is_onnx, open_source, refuse_memory
from regcache.passes.errors import InputError, MissingExtraError, RegcacheError
from regcache.runtime.device import Device
from regcache.runtime.parity import OUTPUT_NAMES
from regcache.runtime.parity_result import Reference


class ReferenceChoice(StrEnum):
    """What an artifact is compared with."""

    AUTO = "auto"
    PYTORCH = "pytorch"
    FLOAT_ONNX = "float-onnx"


class Against(StrEnum):
    """Which of an artifact's models is compared: what it ships, or the export it came from."""

    ARTIFACT = "artifact"
    FLOAT = "float"


@dataclass(frozen=True)
class Original:
    """What is compared with. `processor`: the source's own, which PyTorch's original has."""

    kind: Reference
    run: Encoder
    processor: Processor | None = None

    def led_by(self, name: str) -> "Original":
        """This original with its output `name` first.

        A float ONNX is opened with the wanted output first already. PyTorch gives OUTPUT_NAMES in
        order, so that its two outputs change places where the second is wanted.
        """
        if self.kind == "float-onnx" or name != OUTPUT_NAMES[1]:
            return self
        return replace(self, run=lambda images: self.run(images)[::-1])


def open_original(
    artifact: Artifact,
    choice: ReferenceChoice,
    against: Against,
    sessions: ExitStack,
    threads: int | None,
    device: Device,
    reporter: Reporter,
) -> Original:
    """The original to compare with: the PyTorch one where asked for, else the float ONNX.

    Under `auto` the float ONNX takes the place of a PyTorch original that cannot be run, or is not
    on this machine, with a warning. Raises InputError where there is nothing to compare with.
    """
    options = artifact.manifest.options
    itself = against is Against.FLOAT
    if itself and choice is ReferenceChoice.FLOAT_ONNX:
        raise InputError(f"{artifact.folder}: {FLOAT} cannot be compared with itself")
    if choice is not ReferenceChoice.FLOAT_ONNX:
        try:
            # Whoever wrote the manifest named the source: only who asks for it goes and gets it.
            with nullcontext() if choice is ReferenceChoice.PYTORCH else unfetched():
                original = _pytorch(options.source, options.resolution, threads)
        except RegcacheError as error:
            if choice is ReferenceChoice.PYTORCH or itself:
                raise
            hint = (
                "; --reference pytorch fetches what is missing" if is_on_hub(options.source) else ""
            )
            reporter.warn(f"comparing with {FLOAT}, not PyTorch: {error}{hint}")
        else:
            if original is not None:
                return original
            if choice is ReferenceChoice.PYTORCH or itself:
                raise InputError(f"{options.source}: is an ONNX file, there is no PyTorch original")
    session = sessions.enter_context(artifact.float_session(threads=threads, device=device))
    return Original("float-onnx", session.run)


def _pytorch(source: str, resolution: int | None, threads: int | None) -> Original | None:
    if is_onnx(source):
        return None
    refuse_memory(source)
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("the PyTorch original", extra="export", module="torch")
    with uncollected():
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        opened = open_source(source)
        run = opened.reference(resolution=resolution)
        with quiet():
            processor = opened.processor(resolution=resolution)
    return None if run is None else Original("pytorch", run, processor)
