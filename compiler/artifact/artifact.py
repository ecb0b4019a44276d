"""A compiled artifact on disk, opened after its files were checked against its manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from regcache.compiler.artifact.manifest import Manifest, read_manifest
from regcache.compiler.encoder.prepare import FLOAT
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.device import CPU, Device
from regcache.runtime.openvino_options import InferencePrecision
from regcache.runtime.run_with import RuntimeName, RunWith, Session, open_session

MODEL, PREPROCESS = "model.onnx", "preprocess.json"


@dataclass(frozen=True)
class Artifact:
    """The folder that `regcache compile` wrote, checked against its manifest when it was opened."""

    folder: Path
    manifest: Manifest
    recipe: Preprocess

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Check every file, and read the manifest and the preprocessing recipe.

        Raises InputError when the folder is no artifact or a byte of it has changed.
        """
        manifest = read_manifest(folder)
        recipe = Preprocess.from_json((folder / PREPROCESS).read_text(encoding="utf-8"))
        return cls(folder, manifest, recipe)

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
        installed or does not load the model.
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
