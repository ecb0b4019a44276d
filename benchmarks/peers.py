"""Other libraries' int8 beside ours: the same float encoder, the same photographs, one meter.

Each peer quantizes in a virtual environment of its own, made once (up to 6 GB where it needs
PyTorch). All models then run here, on ONNX Runtime's CPU, and are compared with the float one.

    python benchmarks/peers.py FLOAT_ONNX --calibration DIR --evaluation DIR [--ours ARTIFACT]...
        [--only NAME]... [--venvs DIR] [--timeout SECONDS] [--keep DIR] [--json FILE]

The seconds are those of the peer's whole process. What it printed stays in the folder of the
environments, as NAME.log; with --keep its model stays as NAME.onnx. A peer
that cannot be installed or run has its reason in the table.
"""

import glob
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from regcache.compiler.artifact.artifact import Artifact
from regcache.export.onnx_file import OnnxFileSource, sidecar
from regcache.passes.errors import InputError, first_line
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import Batch, ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.parity import ParityMeter
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.session import OrtSession, available_cpus
from regcache.runtime.speed import SpeedRatio, compare_speed

# Table columns that a narrower terminal would break into several lines.
_WIDTH = 150
_PIP_SECONDS = 3600
_ERROR = re.compile(r"^(ERROR: |[\w.]*(Error|Exception|Exit|Interrupt)\b)")


# --- What runs in a peer's environment: these functions are copied there as text, without the
# --- imports above, so each imports what it needs.


def feeds(model: str, images: str) -> Iterator[dict[str, Any]]:
    """The calibration images one at a time, each under the name of the model's input."""
    import numpy
    import onnx

    name = onnx.load(model, load_external_data=False).graph.input[0].name
    for image in numpy.load(images):
        yield {name: image[None]}


def with_ort(model: str, images: str, output: str, activations: str, ops: str) -> None:
    """ONNX Runtime, min-max QDQ, weights int8 per channel.

    `ops`: "all"; "linears" only; or "inputs", linears whose outputs are not rounded, too.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    items, prepared = feeds(model, images), f"{images}.onnx"
    reader = type(
        "Reader",
        (quantization.CalibrationDataReader,),
        {"get_next": lambda _: next(items, None)},
    )
    linears = ["Conv", "Gemm", "MatMul"]
    quant_pre_process(model, prepared)
    quantization.quantize_static(
        prepared,
        output,
        reader(),
        quant_format=quantization.QuantFormat.QDQ,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        activation_type=quantization.QuantType.from_string(activations),
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=None if ops == "all" else linears,
        extra_options={
            "MatMulConstBOnly": ops != "all",
            "OpTypesToExcludeOutputQuantization": linears if ops == "inputs" else [],
        },
    )


def with_modelopt(model: str, images: str, output: str, method: str) -> None:
    """NVIDIA Model Optimizer; what it leaves unquantized stays float32, so that CPUs run it."""
    from importlib import import_module

    import numpy
    import onnx

    quantization: Any = import_module("modelopt.onnx.quantization")
    name = onnx.load(model, load_external_data=False).graph.input[0].name
    quantization.quantize(
        model,
        quantize_mode="int8",
        calibration_data={name: numpy.load(images)},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=output,
    )


def with_nncf(model: str, images: str, output: str, preset: str) -> None:
    """NNCF's post-training quantization for transformers, bias correction included."""
    from importlib import import_module

    import onnx

    nncf: Any = import_module("nncf")
    items = list(feeds(model, images))
    quantized = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(items),
        preset=nncf.QuantizationPreset(preset),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(items),
    )
    onnx.save(quantized, output)


def with_quark(model: str, images: str, output: str, preset: str, *algorithms: str) -> None:
    """AMD Quark's preset of that name; `algorithms`: "SmoothQuantConfig" and the like.

    Its presets have one scale for a weight; "channels" among them asks for one for each channel,
    which 0.13 does without its placement of Q/DQ pairs for transformers only.
    """
    from importlib import import_module

    from onnxruntime.quantization import CalibrationDataReader

    quark: Any = import_module("quark.onnx")
    items = feeds(model, images)
    reader = type("Reader", (CalibrationDataReader,), {"get_next": lambda _: next(items, None)})
    config = quark.QConfig.get_default_config(preset)
    if "channels" in algorithms:
        config.global_quant_config.per_channel = True
        config.global_quant_config.enable_npu_transformer = False
    chosen = [getattr(quark, algorithm)() for algorithm in algorithms if algorithm != "channels"]
    quark.ModelQuantizer(config).quantize_model(model, output, reader(), algorithms=chosen)


# --- What runs here.


@dataclass(frozen=True)
class Library:
    """A peer's package, pinned, and what it needs beside what it asks for itself."""

    package: str
    version: str
    extras: str = ""
    needs: tuple[str, ...] = ()

    @property
    def requirements(self) -> tuple[str, ...]:
        """As pip takes them."""
        return (f"{self.package}{self.extras}=={self.version}", *self.needs)


@dataclass(frozen=True)
class Peer:
    """One way to quantize: `quantize` gets the model, the images, the output, then `options`."""

    name: str
    library: Library
    quantize: Callable[..., None]
    options: tuple[str, ...]
    how: str


_ORT = Library("onnxruntime", "1.32.0", needs=("onnx", "sympy"))
_MODELOPT = Library("nvidia-modelopt", "0.47.0", extras="[onnx]")
_NNCF = Library("nncf", "3.4.0", needs=("onnx", "onnxruntime"))
_QUARK = Library("amd-quark", "0.13", needs=("onnxruntime", "torch"))

PEERS = (
    Peer("ort-u8s8", _ORT, with_ort, ("QUInt8", "all"), "min-max, all ops"),
    Peer("ort-s8s8", _ORT, with_ort, ("QInt8", "all"), "min-max, all ops"),
    Peer("ort-u8s8-linears", _ORT, with_ort, ("QUInt8", "linears"), "min-max, linears only"),
    Peer("ort-s8s8-linears", _ORT, with_ort, ("QInt8", "linears"), "min-max, linears only"),
    Peer("modelopt-max", _MODELOPT, with_modelopt, ("max",), "int8, max"),
    Peer("modelopt-entropy", _MODELOPT, with_modelopt, ("entropy",), "int8, entropy"),
    Peer("nncf-performance", _NNCF, with_nncf, ("performance",), "transformer, performance"),
    Peer("nncf-mixed", _NNCF, with_nncf, ("mixed",), "transformer, mixed"),
    Peer(
        "quark-default",
        _QUARK,
        with_quark,
        ("INT8_TRANSFORMER_DEFAULT",),
        "INT8_TRANSFORMER_DEFAULT",
    ),
    Peer(
        "quark-channels",
        _QUARK,
        with_quark,
        ("INT8_TRANSFORMER_DEFAULT", "channels"),
        "INT8_TRANSFORMER_DEFAULT, a scale for each channel of a weight",
    ),
    Peer(
        "quark-smooth",
        _QUARK,
        with_quark,
        ("INT8_TRANSFORMER_DEFAULT", "SmoothQuantConfig"),
        "INT8_TRANSFORMER_DEFAULT, SmoothQuant",
    ),
    Peer(
        "quark-accurate",
        _QUARK,
        with_quark,
        ("INT8_TRANSFORMER_ACCURATE",),
        "INT8_TRANSFORMER_ACCURATE (AdaRound)",
    ),
)


class PeerError(Exception):
    """Why a peer has no figures, in one line."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one model against the float one, at batch 1."""

    megabytes: float
    parity: ParityResult
    speed: SpeedRatio


@dataclass(frozen=True)
class Row:
    """One model of the table; `figures` or `failure` is None, `seconds` where nobody timed it."""

    name: str
    version: str
    how: str
    ours: bool
    seconds: float | None = None
    figures: Figures | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Bench:
    """The float model, the images, and the float embeddings that every model is compared with."""

    model: Path
    calibration: NDArray[np.float32]
    evaluation: list[Batch]
    embeddings: list[NDArray[Any]]

    @classmethod
    def of(cls, model: Path, calibration: Path, evaluation: Path) -> "Bench":
        """Raises InputError when the model or the images cannot be used."""
        recipe = _recipe(model)
        batches = list(ImageFolder(list_images(evaluation), recipe, 1))
        with OrtSession(model) as session:
            embeddings = [session.run(batch.images)[0] for batch in batches]
        images = [batch.images for batch in ImageFolder(list_images(calibration), recipe, 1)]
        return cls(model, np.concatenate(images), batches, embeddings)

    def measure(self, quantized: Path, *, integers: bool = True) -> Figures:
        """By ONNX Runtime's integer kernels, or without them as TensorRT would compute it.

        Raises InputError when the model cannot be run or has other outputs.
        """
        meter = ParityMeter()
        with OrtSession(quantized, integers=integers) as session:
            for batch, embedding in zip(self.evaluation, self.embeddings, strict=True):
                names = [path.name for path in batch.paths]
                meter.update([embedding], session.run(batch.images)[:1], names)
        few = self.evaluation[0].images
        (speed,) = compare_speed(self.model, quantized, few, batches=(1,))
        return Figures(_megabytes(quantized), meter.result(reference="float-onnx"), speed)


def measure_peer(
    peer: Peer, bench: Bench, venvs: Path, timeout: int, keep: Path | None = None
) -> Row:
    """Install what the peer needs, quantize, measure; whatever goes wrong is in the row."""
    row = (peer.name, f"{peer.library.package} {peer.library.version}", peer.how, False)
    try:
        python = venv_python(peer.library, venvs)
        with tempfile.TemporaryDirectory() as scratch:
            quantized = Path(scratch) / "model.onnx"
            seconds = quantize(peer, bench, python, quantized, venvs / f"{peer.name}.log", timeout)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(quantized, keep / f"{peer.name}.onnx")
            return Row(*row, seconds, bench.measure(quantized))
    except (PeerError, InputError) as error:
        return Row(*row, failure=first_line(error))


def venv_python(library: Library, venvs: Path) -> Path:
    """The interpreter of the library's environment, which is made where there is none.

    Raises PeerError when pip fails; the next run tries again.
    """
    folder = venvs / f"{library.package}-{library.version}"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(library.requirements)
    if installed.is_file() and installed.read_text(encoding="utf-8") == wanted:
        return python
    log = venvs / f"{library.package}-pip.log"
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], log, _PIP_SECONDS)
    pip = [str(python), "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check"]
    _run([*pip, *library.requirements], log, _PIP_SECONDS)
    installed.write_text(wanted, encoding="utf-8")
    return python


def write_script(peer: Peer, path: Path) -> None:
    """What runs in the peer's environment, with the model, the images, the output and options."""
    call = f"{peer.quantize.__name__}(*sys.argv[1:])"
    sources = [inspect.getsource(item) for item in (feeds, peer.quantize)]
    header = "import sys\nfrom collections.abc import Iterator\nfrom typing import Any\n"
    main = f'if __name__ == "__main__":\n    {call}\n'
    path.write_text("\n\n".join([header, *sources, main]), encoding="utf-8")


def quantize(
    peer: Peer, bench: Bench, python: Path, output: Path, log: Path, timeout: int
) -> float:
    """Write the peer's int8 model to `output`; returns the seconds it took."""
    script, images = output.with_name("quantize.py"), output.with_name("calibration.npy")
    np.save(images, bench.calibration)
    write_script(peer, script)
    # A copy with its external data: modelopt writes to the file that it reads.
    own = output.parent / "float"
    own.mkdir()
    OnnxFileSource.open(str(bench.model)).export(own / "float.onnx")
    files = (str(own / "float.onnx"), str(images), str(output))
    start = time.perf_counter()
    _run([str(python), str(script), *files, *peer.options], log, timeout, output.parent)
    seconds = time.perf_counter() - start
    if not output.is_file():
        raise PeerError("ended without an error and without a model")
    return seconds


def _run(command: list[str], log: Path, timeout: int, folder: Path | None = None) -> None:
    """Run to the end with all output in `log`; raises PeerError with what it says went wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"took longer than {timeout} s") from None
    if done.returncode < 0:
        raise PeerError(f"was ended by signal {-done.returncode} (out of memory?)")
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        errors = [line for line in said if _ERROR.match(line)]
        raise PeerError((errors or said or [f"exit code {done.returncode}"])[-1])


def measure_ours(artifact: Path, bench: Bench) -> Row:
    """One of regcache's own artifacts; how long it took to compile is not recorded in it."""
    opened = Artifact.open(artifact)
    manifest = opened.manifest
    share = manifest.quantization.int8_share
    how = f"{manifest.options.target.value}, {share:.0%} int8"
    row = (f"regcache {artifact.name}", f"regcache {manifest.regcache}", how, True)
    return Row(*row, figures=bench.measure(opened.model, integers=opened.runs_integers))


def _recipe(model: Path) -> Preprocess:
    """The recipe beside an ONNX file, or beside an artifact's float.onnx."""
    for file in (sidecar(model), model.with_name("preprocess.json")):
        if file.is_file():
            return Preprocess.from_json(file.read_text(encoding="utf-8"))
    raise InputError(f"{model}: no {sidecar(model).name} or preprocess.json beside it")


def _megabytes(model: Path) -> float:
    """Of the file and its external data, as far as that is named after it."""
    files = model.parent.glob(f"{glob.escape(model.name)}*")
    return sum(file.stat().st_size for file in files) / 1e6


def table_of(rows: list[Row], bench: Bench) -> Table:
    """The rows, the closest to float first, those without figures last."""
    numbers = ("cosine mean", "cosine min", "nn agree", "seconds", "MB", "time / float")
    columns = [Column(header, justify="right", no_wrap=True) for header in numbers]
    table = Table(
        *(Column("model", no_wrap=True), Column("package", no_wrap=True)),
        *(*columns, Column("how, or why not", overflow="fold")),
        title=f"{len(bench.calibration)} calibration, {len(bench.evaluation)} evaluation images; "
        f"float: {_megabytes(bench.model):.1f} MB",
    )
    for row in rows:
        style = "bold green" if row.ours else "red" if row.failure else None
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        cells = ["", "", "", seconds, "", ""]
        if row.figures is not None:
            parity = row.figures.parity
            cells = [f"{parity.cosine_mean:.6f}", f"{parity.cosine_min:.5f}"]
            cells += [f"{parity.nn_agreement:.3f}", seconds, f"{row.figures.megabytes:.1f}"]
            cells.append(f"{row.figures.speed.ratio:.2f}")
        mark = "* " if row.ours else "  "
        table.add_row(mark + row.name, row.version, *cells, row.failure or row.how, style=style)
    table.caption = "* ours"
    return table


def _closeness(row: Row) -> float:
    return -2.0 if row.figures is None else row.figures.parity.cosine_mean


def _as_json(row: Row) -> dict[str, Any]:
    fields = {key: value for key, value in vars(row).items() if key != "figures"}
    if row.figures is None:
        return fields
    parity, speed = row.figures.parity.model_dump(), row.figures.speed.model_dump()
    return {**fields, "megabytes": row.figures.megabytes, "parity": parity, "speed": speed}


def main(
    float_onnx: Path,
    calibration: Annotated[Path, typer.Option()],
    evaluation: Annotated[Path, typer.Option()],
    ours: Annotated[list[Path] | None, typer.Option(help="An artifact of regcache.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A peer's name, or how it starts.")] = None,
    venvs: Annotated[Path, typer.Option()] = Path("build/peers"),
    timeout: Annotated[int, typer.Option(help="Seconds that a peer may quantize.")] = 1800,
    keep: Annotated[Path | None, typer.Option(help="Where the peers' models stay.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print one table of all models, sorted by the mean cosine to float."""
    unknown = [one for one in only or [] if not any(peer.name.startswith(one) for peer in PEERS)]
    if unknown:
        known = ", ".join(peer.name for peer in PEERS)
        raise typer.BadParameter(f"no peer {', '.join(unknown)} among {known}")
    peers = [peer for peer in PEERS if not only or peer.name.startswith(tuple(only))]
    venvs = venvs.resolve()
    venvs.mkdir(parents=True, exist_ok=True)
    says = Console(stderr=True, highlight=False)
    try:
        bench = Bench.of(float_onnx, calibration, evaluation)
        rows = [measure_ours(artifact, bench) for artifact in ours or []]
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    for peer in peers:
        says.print(f"{peer.name}: {peer.how}", markup=False)
        rows.append(measure_peer(peer, bench, venvs, timeout, keep))
    rows.sort(key=_closeness, reverse=True)
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table_of(rows, bench))
    if json_file is not None:
        figures = {
            "calibration_images": len(bench.calibration),
            "float_megabytes": _megabytes(bench.model),
            "rows": [_as_json(row) for row in rows],
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
