"""A compiled artifact on disk, opened after its files were checked against its manifest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.read_manifest import read_manifest
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.job.staging import is_written
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.device import CPU, Device
from regcache.runtime.openvino_options import InferencePrecision
from regcache.runtime.run_with import RuntimeName, RunWith, Session, open_session
from regcache.runtime.shown_table import Row, ShownTable

MODEL, PREPROCESS, REGISTERS = "model.onnx", "preprocess.json", "registers.npz"
_TRIES = 20
# Seconds in which another process has put an artifact where there is none just now.
_PAUSE = 0.02

Identity = tuple[int, int, int] | None
"""What tells a folder from every other that has its name: device, inode, when it was renamed."""


class ReplacedError(InputError):
    """An artifact that took the place of another while that was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder}: was replaced while it was read; try again")


@dataclass(frozen=True)
class Artifact(ShownTable):
    """The folder that `regcache compile` wrote, checked against its manifest when it was opened.

    `identity`: of the folder that was opened, which another may have replaced since.
    """

    folder: Path
    manifest: Manifest
    recipe: Preprocess
    identity: Identity = None

    @classmethod
    def open(cls, folder: Path, *, verify: Path | None = None) -> Self:
        """Check every file, and read the manifest and the preprocessing recipe.

        `verify`: a public key of OpenSSH's, by whose owner the manifest has to be signed.
        Raises InputError when the folder is no artifact, a byte of it has changed or it is not
        signed as asked; ReplacedError, which is one, when it is replaced again and again meanwhile.
        """
        for _ in range(_TRIES):
            identity = _identify(folder)
            try:
                manifest = read_manifest(folder, verify)
                recipe = Preprocess.from_json((folder / PREPROCESS).read_text(encoding="utf-8"))
            except (InputError, OSError) as error:
                if identity is None and is_written(folder):
                    time.sleep(_PAUSE)
                elif identity == _identify(folder):
                    _raise_input_error(error, folder)
                continue
            if identity == _identify(folder):
                return cls(folder, manifest, recipe, identity)
        raise ReplacedError(folder)

    @contextmanager
    def unreplaced(self) -> Iterator[None]:
        """Wrap a block that reads files of the artifact.

        Raises ReplacedError where another artifact took the folder's place meanwhile: what was
        read may be of either.
        """
        try:
            yield
        except (InputError, OSError) as error:
            if self.identity != _identify(self.folder):
                raise ReplacedError(self.folder) from error
            raise
        if self.identity != _identify(self.folder):
            raise ReplacedError(self.folder)

    def rows(self) -> list[Row]:
        """One row: what was compiled, its size, and how close it is by the first look at it."""
        manifest, parity = self.manifest, self.manifest.parity.result
        sizes = {name: file.size / 1e6 for name, file in manifest.files.items()}
        ratios = [] if manifest.speed is None else manifest.speed.ratios
        return [
            {
                "artifact": str(self.folder),
                "source": manifest.options.source,
                "target": manifest.options.target.value,
                "precision": manifest.options.precision.value,
                "registers": manifest.curation.reason,
                "int8_share": manifest.quantization.int8_share,
                "cosine_mean": parity.cosine_mean,
                "cosine_min": parity.cosine_min,
                "model_mb": sum(sizes[name] for name in sizes if name.startswith(MODEL)),
                "float_mb": sum(sizes[name] for name in sizes if name.startswith(FLOAT)),
                "time_to_float": ratios[0].ratio if ratios else None,
            }
        ]

    @property
    def model(self) -> Path:
        """The compiled encoder."""
        return self.folder / MODEL

    @property
    def float_model(self) -> Path:
        """The float original. Raises InputError where the artifact was compiled with --no-float."""
        if FLOAT not in self.manifest.files:
            raise InputError(f"{self.folder}: holds no {FLOAT}: it was compiled with --no-float")
        return self.folder / FLOAT

    @property
    def runs_integers(self) -> bool:
        """Whether ONNX Runtime runs the model with integer kernels.

        It computes a model for TensorRT in float, between dequantized tensors.
        """
        return self.manifest.options.profile.integers

    @property
    def inference_precision(self) -> InferencePrecision:
        """What OpenVINO is to compute in where nothing is quantized, unless told."""
        return self.manifest.options.precision.in_openvino

    @property
    def first_outputs(self) -> tuple[str, ...]:
        """The names of the embedding and of the hidden state; empty in a manifest of format 4."""
        return self.manifest.encoder.first_outputs

    def session(
        self,
        *,
        threads: int | None = None,
        device: Device = CPU,
        deployed: bool = False,
        run_with: RunWith | None = None,
    ) -> Session:
        """The compiled encoder in its runtime, the embedding its first output.

        In ONNX Runtime a GPU computes in float what a CPU does in integers, rounded as written.
        `deployed`: see OrtSession. Raises InputError or MissingExtraError where the runtime is not
        installed or does not load the model, ReplacedError where that may be another artifact's.
        """
        return self._open(self.model, threads, device, run_with or RunWith(), deployed)

    def float_session(
        self,
        *,
        threads: int | None = None,
        device: Device = CPU,
        run_with: RunWith | None = None,
    ) -> Session:
        """The float original, by default in ONNX Runtime. Raises InputError where there is none."""
        chosen = run_with or RunWith(RuntimeName.ONNXRUNTIME)
        return self._open(self.float_model, threads, device, chosen, deployed=False)

    def _open(
        self, model: Path, threads: int | None, device: Device, run_with: RunWith, deployed: bool
    ) -> Session:
        openvino = run_with.openvino
        if model == self.model:
            openvino = openvino.for_model(self.inference_precision)
        with self.unreplaced():
            return open_session(
                model,
                run_with.settle(self.manifest.options.profile.runtime, device),
                threads=threads,
                outputs=self.first_outputs,
                integers=self.runs_integers or model != self.model,
                deployed=deployed,
                device=device,
                openvino=openvino,
            )


def _identify(folder: Path) -> Identity:
    """None where there is nothing."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _raise_input_error(error: InputError | OSError, folder: Path) -> NoReturn:
    if isinstance(error, InputError):
        raise error
    raise InputError(f"{error.filename or folder}: {error.strerror or error}") from error
