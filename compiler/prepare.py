"""From a source to a canonical float graph with its encoder view and preprocessing recipe."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import onnx_graphsurgeon as gs

from regcache.compiler.reporter import Reporter
from regcache.export.source import open_source
from regcache.passes.canonicalize import canonicalize
from regcache.passes.choose_outputs import OutputChoice, choose_outputs
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import load_model
from regcache.passes.preprocess import Preprocess

FLOAT = "float.onnx"
# ImageNet's statistics, which most vision encoders were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SourceOptions(Protocol):
    """What decides how a source becomes a float graph."""

    @property
    def source(self) -> str:
        """SOURCE as the user wrote it."""

    @property
    def resolution(self) -> int | None:
        """Side of the square input in pixels; None for the source's own."""

    @property
    def output(self) -> str | None:
        """Name of the output that is the embedding; None for the most likely one."""

    @property
    def preprocess(self) -> str | None:
        """A preprocess.json that takes the place of the source's recipe."""


@dataclass(frozen=True)
class FloatEncoder:
    """A float encoder ready to be calibrated.

    `path` is its ONNX file as exported, `graph` the canonical form, `recipe_from` says whether the
    recipe came with the source, from an option, or had to be assumed. `outputs`: which is what.
    """

    path: Path
    graph: gs.Graph
    view: EncoderView
    recipe: Preprocess
    recipe_from: Literal["source", "option", "assumed"]
    outputs: OutputChoice

    def batch(self, wanted: int) -> int:
        """The batch size to run with: the graph's own where it is fixed."""
        shape = self.graph.inputs[0].shape
        return shape[0] if shape and isinstance(shape[0], int) else wanted

    def remove_file(self) -> None:
        """Delete the ONNX file and its external data."""
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink()


def prepare(options: SourceOptions, folder: Path, reporter: Reporter) -> FloatEncoder:
    """Export the source to `folder`/float.onnx, canonicalise it and find its blocks.

    Raises InputError, naming the source, where it cannot be read, exported or understood.
    """
    path = folder / FLOAT
    reporter.step(f"exporting {options.source}")
    own = export_source(options.source, path, options.resolution)
    try:
        graph = canonicalize(load_model(path))
        view = view_encoder(graph)
        outputs = choose_outputs(view, options.output)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{options.source}: {reason}") from error
    height, width = _input_size(graph, options.source)
    recipe, recipe_from = _recipe(options, own, height, width, reporter)
    if (recipe.height, recipe.width) != (height, width):
        raise InputError(
            f"{options.source}: takes {height} x {width} pixels, but the preprocessing recipe "
            f"makes {recipe.height} x {recipe.width}"
        )
    reporter.step(
        f"found {len(view.blocks)} blocks of width {view.width}, {view.heads} heads, "
        f"{len(view.linears)} linears"
    )
    reporter.step(outputs.describe())
    return FloatEncoder(path, graph, view, recipe, recipe_from, outputs)


def export_source(source: str, path: Path, resolution: int | None) -> Preprocess | None:
    """Write a source to `path` as ONNX; returns its preprocessing recipe if it has one.

    PyTorch runs in a process of its own: importing it takes more memory than compiling does.
    """
    opened = open_source(source)
    if source.endswith(".onnx"):
        return opened.export(path, resolution=resolution)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_export, source, path, resolution).result()
    except BrokenProcessPool as error:
        raise InputError(f"{source}: the exporting process was killed (out of memory?)") from error


def _export(source: str, path: Path, resolution: int | None) -> Preprocess | None:
    return open_source(source).export(path, resolution=resolution)


def _input_size(graph: gs.Graph, source: str) -> tuple[int, int]:
    shape = graph.inputs[0].shape
    if len(graph.inputs) != 1 or not shape or len(shape) != 4 or shape[1] not in (3, "?"):
        found = ", ".join(f"{item.name} {item.shape}" for item in graph.inputs)
        raise InputError(f"{source}: needs one image input [batch, 3, H, W], has {found}")
    if not isinstance(shape[2], int) or not isinstance(shape[3], int):
        raise InputError(f"{source}: height and width must be fixed in the graph, not {shape}")
    return shape[2], shape[3]


def _recipe(
    options: SourceOptions, own: Preprocess | None, height: int, width: int, reporter: Reporter
) -> tuple[Preprocess, Literal["source", "option", "assumed"]]:
    if options.preprocess is not None:
        file = Path(options.preprocess)
        try:
            return Preprocess.from_json(file.read_text(encoding="utf-8")), "option"
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise InputError(f"{file}: {error}") from error
    if own is not None:
        return own, "source"
    # The usual evaluation recipe: an eighth more than the crop, bicubic.
    larger = (round(height * 8 / 7), round(width * 8 / 7))
    reporter.warn(
        f"{options.source} comes without a preprocessing recipe; assuming ImageNet mean and std, "
        f"resize to {min(larger)} bicubic, crop {height} x {width} (or give --preprocess)"
    )
    assumed = Preprocess(
        height, width, "shortest", (min(larger), min(larger)), "bicubic", _MEAN, _STD
    )
    return assumed, "assumed"
