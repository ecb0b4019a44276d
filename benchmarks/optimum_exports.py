"""What `optimum-cli export onnx` writes, compiled: how many of its files become integers.

Tiny random checkpoints are saved and exported in a virtual environment of their own (made once,
1.3 GB with a PyTorch that knows no GPU, 6 GB with pip's default). Everything else runs here.

    python benchmarks/optimum_exports.py --calibration DIR --evaluation DIR [--only NAME]...
        [--folder DIR] [--target ort-cpu] [--json FILE]

Both the artifact and the original file run on the pixels that the checkpoint's own image processor
makes, in ONNX Runtime; `cosine` is that of the worst of the artifact's outputs, `pixels` the
largest difference of what the artifact's recipe makes of the same images. Exit code 1 where a
family is refused, not all of its quantized linears are integer kernels, a mean cosine is below
.999, or the recipe is another.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from regcache.compiler.artifact.artifact import Artifact
from regcache.passes.errors import InputError
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops

# The newest optimum-onnx, the transformers that it asks for, and a PyTorch that both know.
REQUIREMENTS = (
    "optimum==2.1.0",
    "optimum-onnx[onnxruntime]==0.1.0",
    "transformers==4.57.6",
    "torch==2.13.0",
    "pillow",
)
WANTED = 0.999
SAME_PIXELS = 0.05  # twice the step of 8 bits, once it is normalised
_PIP_SECONDS, _STEP_SECONDS = 3600, 600
_WIDTH = 150


@dataclass(frozen=True)
class Export:
    """One call of optimum-cli: a checkpoint that `save_checkpoints` made, and how."""

    name: str
    checkpoint: str
    arguments: tuple[str, ...]
    family: str | None = None  # what the figure counts; variants are shown beside


_FEATURES = ("--task", "feature-extraction")
_CLASSES = ("--task", "image-classification")
EXPORTS = (
    Export("clip", "clip", _FEATURES, "CLIP"),
    Export("siglip", "siglip", _FEATURES, "SigLIP"),
    Export("dinov2", "dinov2", _FEATURES, "DINOv2"),
    Export("vit", "vit", _FEATURES, "ViT"),
    Export("deit", "deit", _FEATURES, "DeiT"),
    Export("beit", "beit", _FEATURES, "BEiT"),
    Export("clip-vision", "clip-vision", _FEATURES),
    Export("siglip-vision", "siglip-vision", _FEATURES),
    Export("clip-zero-shot", "clip", ("--task", "zero-shot-image-classification")),
    Export("vit-classifier", "vit-classifier", _CLASSES),
    Export("beit-classifier", "beit-classifier", _CLASSES),
    Export("dinov2-classifier", "dinov2-classifier", _CLASSES),
    Export("vit-opset-14", "vit", (*_FEATURES, "--opset", "14")),
    Export("vit-fixed", "vit", (*_FEATURES, "--no-dynamic-axes")),
    Export("vit-O2", "vit", (*_FEATURES, "--optimize", "O2")),
)


# --- What runs in optimum's environment: copied there as text, so it imports what it needs.


def save_checkpoints(folder: str, images: str) -> None:
    """Checkpoints as transformers saves them, and what their processors make of `images`."""
    from importlib import import_module
    from pathlib import Path

    import numpy
    import torch
    from PIL import Image

    lib: Any = import_module("transformers")
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tower |= {"num_hidden_layers": 3, "image_size": 64, "patch_size": 16}
    classes = tower | {"num_labels": 10}
    text = tower | {"vocab_size": 99, "max_position_embeddings": 16, "num_hidden_layers": 1}
    dino = tower | {"image_size": 112, "patch_size": 14}  # positions are made smaller, as released
    square, smaller = {"height": 64, "width": 64}, {"height": 56, "width": 56}
    edge = {"shortest_edge": 64}
    clip = lib.CLIPImageProcessor(size=edge, crop_size=square)
    siglip = lib.SiglipImageProcessor(size=square)
    vit = lib.ViTImageProcessor(size=square)
    bit = lib.BitImageProcessor(size=edge, crop_size=smaller, image_mean=[0.485, 0.456, 0.406])
    deit = lib.DeiTImageProcessor(size={"height": 72, "width": 72}, crop_size=square)
    beit = lib.BeitImageProcessor(size=square, do_center_crop=False, image_std=[0.5] * 3)
    both = {"text_config": text, "vision_config": tower}
    models = {
        "clip": (lib.CLIPModel(lib.CLIPConfig(**both, projection_dim=48)), clip),
        "siglip": (lib.SiglipModel(lib.SiglipConfig(**both)), siglip),
        "clip-vision": (lib.CLIPVisionModel(lib.CLIPVisionConfig(**tower)), clip),
        "siglip-vision": (lib.SiglipVisionModel(lib.SiglipVisionConfig(**tower)), siglip),
        "dinov2": (lib.Dinov2Model(lib.Dinov2Config(**dino)), bit),
        "vit": (lib.ViTModel(lib.ViTConfig(**tower)), vit),
        "deit": (lib.DeiTModel(lib.DeiTConfig(**tower)), deit),
        "beit": (lib.BeitModel(lib.BeitConfig(**tower)), beit),
        "vit-classifier": (lib.ViTForImageClassification(lib.ViTConfig(**classes)), vit),
        "dinov2-classifier": (
            lib.Dinov2ForImageClassification(lib.Dinov2Config(**classes | dino)),
            bit,
        ),
        "beit-classifier": (
            lib.BeitForImageClassification(
                lib.BeitConfig(**classes, use_relative_position_bias=True)
            ),
            beit,
        ),
    }
    paths = Path(images).read_text(encoding="utf-8").splitlines()
    photos = [Image.open(path).convert("RGB") for path in paths]
    for name, (model, processor) in models.items():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():  # away from zeros, and no two alike
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        model.eval().save_pretrained(f"{folder}/{name}")
        processor.save_pretrained(f"{folder}/{name}")
        numpy.save(f"{folder}/{name}.npy", processor(photos, return_tensors="np")["pixel_values"])


# --- What runs here.


class StepError(Exception):
    """Why a file has no figures, in one line."""


@dataclass(frozen=True)
class Row:
    """One export; `refusal` where it could not be made, compiled or run."""

    name: str
    family: str | None
    opset: int | None = None
    inputs: str = ""
    quantized: int | None = None
    integer: int | None = None
    output: str = ""
    cosine_mean: float | None = None
    cosine_min: float | None = None
    pixels: float | None = None
    refusal: str | None = None

    @property
    def good(self) -> bool:
        """Compiled to integers alone, and close to the original."""
        all_integer = bool(self.quantized) and self.quantized == self.integer
        if self.cosine_mean is None or self.pixels is None:
            return False
        return all_integer and self.cosine_mean >= WANTED and self.pixels <= SAME_PIXELS


@dataclass(frozen=True)
class Places:
    """Where everything lies, and the images."""

    folder: Path
    calibration: Path
    evaluation: list[Path]
    target: str

    def of(self, kind: str, name: str) -> Path:
        """`kind`: checkpoints, exports or artifacts."""
        return self.folder / kind / name

    def log(self, name: str) -> Path:
        """Everything that a step of that name printed."""
        return self.folder / f"{name}.log"


def make_environment(folder: Path) -> Path:
    """The folder of programs of optimum's environment, installed where there is none."""
    venv, stamp = folder / "venv", folder / "venv" / "installed.txt"
    wanted = "\n".join(REQUIREMENTS)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        log = folder / "pip.log"
        run_step([sys.executable, "-m", "venv", "--clear", str(venv)], log)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir"]
        run_step([*pip, *REQUIREMENTS], log, _PIP_SECONDS)
        stamp.write_text(wanted, encoding="utf-8")
    return venv / "bin"


def run_step(command: list[str], log: Path, seconds: int = _STEP_SECONDS) -> None:
    """Run to the end with all output in `log`; raises StepError with the last line of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if command[0] == sys.executable:
        environment = dict(os.environ)
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StepError(f"took longer than {seconds} s") from None
    said = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        last = ([line.strip() for line in said.splitlines() if line.strip()] or ["nothing"])[-1]
        kind = "traceback: " if "Traceback (most recent call last)" in said else ""
        raise StepError(
            kind + last.removeprefix("regcache: error: ") + f" (exit code {done.returncode})"
        )


def save_all(programs: Path, places: Places) -> None:
    """Run `save_checkpoints` over there."""
    script, images = places.folder / "save.py", places.folder / "images.txt"
    images.write_text("\n".join(map(str, places.evaluation)), encoding="utf-8")
    body = inspect.getsource(save_checkpoints)
    call = "save_checkpoints(*sys.argv[1:])\n"
    script.write_text(f"import sys\nfrom typing import Any\n\n\n{body}\n\n{call}", encoding="utf-8")
    checkpoints = places.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    python = str(programs / "python")
    run_step([python, str(script), str(checkpoints), str(images)], places.log("save"))


def measure(export: Export, programs: Path, places: Places) -> Row:
    """Export, compile, compare; whatever goes wrong is in the row."""
    row = Row(export.name, export.family)
    try:
        original = export_by_optimum(export, programs, places)
    except StepError as error:
        return Row(**asdict(row) | {"refusal": f"optimum-cli: {error}"})
    found = asdict(row) | describe(original)
    try:
        artifact = compile_file(export.name, original, places)
        found |= count_integers(artifact.model)
        found |= compare(original, artifact, places, export)
    except (StepError, InputError) as error:
        return Row(**found | {"refusal": str(error)})
    return Row(**found)


def export_by_optimum(export: Export, programs: Path, places: Places) -> Path:
    """The model.onnx that optimum-cli writes."""
    output = places.of("exports", export.name)
    checkpoint = places.of("checkpoints", export.checkpoint)
    command = [str(programs / "optimum-cli"), "export", "onnx", "--model", str(checkpoint)]
    run_step([*command, *export.arguments, str(output)], places.log(f"{export.name}-export"))
    return output / "model.onnx"


def describe(original: Path) -> dict[str, Any]:
    """What the file is, by its own words."""
    model = onnx.load(original, load_external_data=False)
    opset = max(item.version for item in model.opset_import if item.domain in {"", "ai.onnx"})
    inputs = (f"{item.name} {_dims(item)}" for item in model.graph.input)
    return {"opset": opset, "inputs": ", ".join(inputs)}


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def compile_file(name: str, original: Path, places: Places) -> Artifact:
    """`regcache compile` as a user calls it, with a resolution where the file leaves it open."""
    model = onnx.load(original, load_external_data=False)
    image = next(item for item in model.graph.input if len(_dims(item)) == 4)
    command = [sys.executable, "-m", "regcache", "compile", str(original)]
    command += ["--images", str(places.calibration), "--target", places.target]
    command += ["--registers", "off", "--accept-slower"]  # so small, nothing is faster
    if not isinstance(_dims(image)[2], int):
        side = np.load(pixels_of(name, places), mmap_mode="r").shape[2]
        command += ["--resolution", str(side)]
    output = places.of("artifacts", name)
    try:
        run_step([*command, "-o", str(output)], places.log(f"{name}-compile"))
    except StepError as error:
        raise StepError(str(error).replace(f"{original}: ", "")) from error
    return Artifact.open(output)


def pixels_of(name: str, places: Places) -> Path:
    """The evaluation images as the processor of that export's checkpoint makes them."""
    checkpoint = next(item.checkpoint for item in EXPORTS if item.name == name)
    return places.of("checkpoints", f"{checkpoint}.npy")


def count_integers(model: Path) -> dict[str, Any]:
    """Linears whose weight is stored as integers, and the integer kernels that run them."""
    graph = onnx.load(model, load_external_data=False).graph
    stored = {item.name for item in graph.initializer}
    unpacked = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    linears = [node for node in graph.node if node.op_type in {"MatMul", "Gemm"}]
    quantized = sum(node.input[1] in unpacked for node in linears)
    return {"quantized": quantized, "integer": integer_matmuls(optimised_ops(model))}


def compare(original: Path, artifact: Artifact, places: Places, export: Export) -> dict[str, Any]:
    """The artifact's outputs beside those of the same name in the original file."""
    theirs = np.load(pixels_of(export.name, places)).astype(np.float32)
    (batch,) = ImageFolder(places.evaluation, artifact.recipe, len(places.evaluation))
    if batch.images.shape != theirs.shape:
        raise StepError(f"makes {batch.images.shape} of the images, not {theirs.shape}")
    with artifact.session() as session:
        ours = dict.fromkeys(session.output_names, np.empty(0))
        size = session.fixed_batch or len(theirs)
        parts = [session.run(part) for part in _chunks(theirs, size)]
        for name, *outputs in zip(ours, *parts, strict=True):
            ours[name] = np.concatenate(outputs)
    expected = run_original(original, theirs)
    renamed = ours.keys() - expected.keys()
    if renamed:
        raise StepError(f"has outputs that the original has not: {', '.join(sorted(renamed))}")
    cosines = {name: _cosines(ours[name], expected[name]) for name in ours}
    worst = min(cosines, key=lambda name: float(cosines[name].mean()))
    return {
        "output": worst,
        "cosine_mean": float(cosines[worst].mean()),
        "cosine_min": float(cosines[worst].min()),
        "pixels": float(np.abs(batch.images - theirs).max()),
    }


def run_original(model: Path, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The file as it came, with one text of eight tokens where it wants one."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    image = next(item for item in session.get_inputs() if item.name == "pixel_values")
    texts = {
        item.name: np.ones((1, 8), np.int64) for item in session.get_inputs() if item is not image
    }
    size = image.shape[0] if isinstance(image.shape[0], int) else len(pixels)
    parts = [session.run(names, {image.name: part, **texts}) for part in _chunks(pixels, size)]
    return {
        name: np.concatenate([part[i] for part in parts])
        for i, name in enumerate(names)
        if len(parts[0][i]) == size
    }


def _chunks(images: NDArray[np.float32], size: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _cosines(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.float64]:
    """One for each image and token."""
    a, b = (item.reshape(-1, item.shape[-1]).astype(np.float64) for item in (ours, theirs))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / lengths)


def table_of(rows: list[Row], target: str) -> Table:
    """One line for each export."""
    counted = [row for row in rows if row.family]
    good = sum(row.good for row in counted)
    compiled = sum(row.refusal is None for row in counted)
    table = Table(
        Column("export", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in ("opset", "integer", "cosine")),
        *(Column(name, justify="right", no_wrap=True) for name in ("worst", "pixels")),
        Column("output, or why not", overflow="fold"),
        title=f"{', '.join(REQUIREMENTS[:4])}; target {target}: "
        f"{compiled} of {len(counted)} families compile, {good} all in integers and close",
    )
    for row in rows:
        numbers = (row.cosine_mean, row.cosine_min)
        cells = ["" if row.quantized is None else f"{row.integer}/{row.quantized}"]
        cells += ["" if number is None else f"{number:.5f}" for number in numbers]
        cells.append("" if row.pixels is None else f"{row.pixels:.4f}")
        style = "green" if row.good else "red"
        mark = "* " if row.family else "  "
        why = row.refusal or row.output
        table.add_row(mark + row.name, str(row.opset or ""), *cells, why, style=style)
    table.caption = "* counted; integer: kernels in ONNX Runtime's graph / quantized linears"
    return table


def main(
    calibration: Annotated[Path, typer.Option(help="Images to calibrate on.")],
    evaluation: Annotated[Path, typer.Option(help="Images to compare on.")],
    only: Annotated[list[str] | None, typer.Option(help="An export's name.")] = None,
    folder: Annotated[Path, typer.Option(help="For all files.")] = Path("build/optimum"),
    target: Annotated[str, typer.Option(help="What will run the artifacts.")] = "ort-cpu",
    limit: Annotated[int, typer.Option(help="Evaluation images.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print one row for each export."""
    unknown = set(only or ()) - {export.name for export in EXPORTS}
    if unknown:
        raise typer.BadParameter(f"no export {', '.join(sorted(unknown))}")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = [path for path in list_images(evaluation) if isinstance(path, Path)]
        images = [path.resolve() for path in files[:limit]]
        places = Places(folder, calibration, sorted(images), target)
        programs = make_environment(folder)
        save_all(programs, places)
    except (InputError, StepError) as error:
        raise typer.BadParameter(str(error)) from error
    says = Console(stderr=True, highlight=False)
    rows = []
    for export in EXPORTS:
        if not only or export.name in only:
            says.print(f"{export.name}: {' '.join(export.arguments)}", markup=False)
            rows.append(measure(export, programs, places))
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table_of(rows, target))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if not all(row.good for row in rows if row.family):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
