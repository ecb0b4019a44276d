"""What a report is about: an artifact, what was measured of it, and what its model holds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.inspection.record import BlockRecord
from regcache.compiler.parity.measure import Embeddings
from regcache.passes.errors import InputError
from regcache.passes.external_weights import stored_tensors
from regcache.passes.preprocess import Preprocess
from regcache.passes.read_small import read_small
from regcache.runtime.bench_result import BenchResult
from regcache.runtime.optimised_graph import optimised_ops
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.run_with import RuntimeName

_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}
_HALF_BYTES = frozenset({"INT4", "UINT4"})


@dataclass(frozen=True)
class Outliers:
    """The float encoder's blocks as images went through: as exported, and with its registers.

    `after`: None where the artifact ships none.
    """

    n_images: int
    before: list[BlockRecord]
    after: list[BlockRecord] | None


@dataclass(frozen=True)
class Measured:
    """What was measured for the report on images of one's own; `outliers` need float.onnx."""

    parity: ParityResult
    embeddings: Embeddings
    outliers: Outliers | None


@dataclass(frozen=True)
class Subject:
    """An artifact with all that a report tells of it.

    `manifest`: the artifact's, with what only its compilation knew. `stored`: bytes of the numbers
    in model.onnx, by number format. `kernels`: how many nodes of each kind ONNX Runtime makes of
    it; None where another runtime runs it.
    """

    name: str
    manifest: Manifest
    recipe: Preprocess
    stored: Mapping[str, int]
    kernels: Mapping[str, int] | None
    measured: Measured | None = None
    bench: BenchResult | None = None

    @property
    def parity(self) -> ParityResult:
        """The comparison with float: on the images that were given, else the first look."""
        return self.manifest.parity.result if self.measured is None else self.measured.parity


def read_subject(
    artifact: Artifact,
    *,
    manifest: Manifest | None = None,
    measured: Measured | None = None,
    bench: BenchResult | None = None,
    threads: int | None = None,
) -> Subject:
    """Look into an artifact's model. `manifest`: in place of the one on disk, which leaves out what
    differs from run to run.

    Raises InputError where the model cannot be loaded, ReplacedError where another artifact took
    the place of this one.
    """
    runtime = artifact.manifest.options.profile.runtime
    computed_here = runtime is RuntimeName.ONNXRUNTIME and artifact.runs_integers
    with artifact.unreplaced():
        return Subject(
            name=artifact.folder.resolve().name,
            manifest=manifest or artifact.manifest,
            recipe=artifact.recipe,
            stored=stored_bytes(artifact.model),
            kernels=optimised_ops(artifact.model, threads=threads) if computed_here else None,
            measured=measured,
            bench=bench,
        )


def read_bench(path: Path) -> BenchResult:
    """What `regcache bench --json` wrote. Raises InputError where the file is no such thing."""
    try:
        return BenchResult.model_validate_json(read_small(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not what regcache bench --json writes") from error


def stored_bytes(model: Path) -> dict[str, int]:
    """Bytes of all numbers that an ONNX file stores, by number format, most first."""
    found = Counter[str]()
    for tensor in stored_tensors(onnx.load(model, load_external_data=False)):
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        count = prod(tensor.dims)
        found[_NAMES.get(name, name.lower())] += (
            -(-count // 2) if name in _HALF_BYTES else count * size
        )
    return {name: size for name, size in found.most_common() if size}
