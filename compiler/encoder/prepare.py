"""From a source to a canonical float graph with its encoder view and preprocessing recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from regcache.compiler.encoder.adoption import adopt_file
from regcache.compiler.encoder.export_process import export_apart
from regcache.compiler.encoder.float_encoder import FloatEncoder, RecipeFrom
from regcache.compiler.encoder.outside_blocks import outside_blocks
from regcache.compiler.encoder.pass_record import pass_records
from regcache.compiler.job.stages import Stage
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import OnnxFileSource
from regcache.export.recipe import at_resolution, for_input
from regcache.export.recipe_file import read_recipe
from regcache.export.source import open_source
from regcache.passes.canonicalize import canonicalize_logged
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.image_input import ImageInput, find_image
from regcache.passes.preprocess import Preprocess
from regcache.passes.read_graph import read_graph

FLOAT = "float.onnx"
# ImageNet's statistics, which most vision encoders were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SourceOptions(Protocol):
    """What decides how a source becomes a float graph."""

    @property
    def source(self) -> str:
        """SOURCE as the user wrote it, or what an object in memory is called."""

    @property
    def source_file(self) -> Path | None:
        """The ONNX file that such an object was written to; None: `source` tells the place."""

    @property
    def resolution(self) -> int | None:
        """Side of the square input in pixels; None for the source's own."""

    @property
    def output(self) -> str | None:
        """Name of the output that is the embedding; None for the most likely one."""

    @property
    def preprocess(self) -> str | Preprocess | None:
        """A recipe, or a preprocess.json, that takes the place of the source's recipe."""


def prepare(
    options: SourceOptions,
    folder: Path,
    reporter: Reporter,
    *,
    verify: bool = True,
    threads: int | None = None,
) -> FloatEncoder:
    """Export the source to `folder`/float.onnx, canonicalise it and find its blocks.

    `verify`: whether a rewritten ONNX file is held against its original by running both, on that
    many `threads`.
    Raises InputError, naming the source, where it cannot be read, exported or understood.
    """
    path = folder / FLOAT
    reporter.begin(Stage.EXPORT, options.source)
    given = _given(options)
    own = export_source(
        options.source,
        path,
        options.resolution,
        reporter,
        file=options.source_file,
        recipe=given,
        verify=verify,
        threads=threads,
    )
    recipe_from: RecipeFrom = "option" if given else "source" if own else "assumed"
    encoder = _understand(options, path, given or own, recipe_from, reporter)
    view = encoder.view
    reporter.step(
        f"found {len(view.blocks)} blocks of width {view.width}, {view.heads} heads, "
        f"{len(view.linears)} linears"
    )
    reporter.step(encoder.outputs.describe())
    return encoder


def reopen(
    options: SourceOptions,
    folder: Path,
    recipe: Preprocess,
    recipe_from: RecipeFrom,
    reporter: Reporter,
) -> FloatEncoder:
    """The encoder that `prepare` left in `folder`, with its recipe; nothing is exported again."""
    return _understand(options, folder / FLOAT, recipe, recipe_from, reporter)


def _understand(
    options: SourceOptions,
    path: Path,
    known: Preprocess | None,
    recipe_from: RecipeFrom,
    reporter: Reporter,
) -> FloatEncoder:
    """Canonicalise an exported file and find its blocks. `known`: its recipe; None to assume one.

    Raises InputError, naming the source, where it cannot be understood.
    """
    try:
        graph, ran = canonicalize_logged(read_graph(path))
        image = find_image(graph)
        view = view_encoder(graph)
        outputs = choose_outputs(view, options.output)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{options.source}: {reason}") from error
    recipe = known or _assumed(options.source, image, reporter)
    recipe = for_input(recipe, image.layout, image.dtype)
    if (recipe.height, recipe.width) != image.size:
        raise InputError(
            f"{options.source}: takes {image.size[0]} x {image.size[1]} pixels, but the "
            f"preprocessing recipe makes {recipe.height} x {recipe.width}"
        )
    passes = (*pass_records(ran), *outside_blocks(view))
    return FloatEncoder(path, graph, view, recipe, recipe_from, outputs, passes)


def export_source(
    source: str,
    path: Path,
    resolution: int | None,
    reporter: Reporter,
    *,
    file: Path | None = None,
    recipe: Preprocess | None = None,
    verify: bool = True,
    threads: int | None = None,
) -> Preprocess | None:
    """Write a source to `path` as ONNX; returns its preprocessing recipe if it has one.

    `file`: an ONNX file in place of what `source` names, which messages still do. `recipe`: of an
    ONNX file, in place of its own. `verify`: whether such a file, rewritten, is held against its
    original by running both, on that many `threads`.
    """
    # What is missing or misspelt is said before a process starts.
    opened = open_source(source) if file is None else OnnxFileSource(source, file)
    if isinstance(opened, OnnxFileSource):
        return adopt_file(
            opened, path, resolution, reporter, recipe=recipe, verify=verify, threads=threads
        )
    return export_apart(source, path, resolution)


def _given(options: SourceOptions) -> Preprocess | None:
    """The recipe of --preprocess, at the resolution that is asked for."""
    given = options.preprocess
    if isinstance(given, str):
        given = read_recipe(Path(given))
    return None if given is None else at_resolution(given, options.resolution)


def _assumed(source: str, image: ImageInput, reporter: Reporter) -> Preprocess:
    """The recipe where a source has none: resize to an eighth more than the crop, bicubic.

    Mean and standard deviation are ImageNet's; a graph that scales or normalises its pixels itself
    gets them as it takes them.
    """
    height, width = (int(side) for side in image.size)
    larger = min(round(height * 8 / 7), round(width * 8 / 7))
    recipe = Preprocess(height, width, "shortest", (larger, larger), "bicubic", _MEAN, _STD)
    pixels = "ImageNet's"
    if image.pixels is not None:
        rescale = 1.0 if image.pixels == "bytes" else 1 / 255
        recipe = replace(recipe, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=rescale)
        span = "0 to 255" if image.pixels == "bytes" else "0 to 1"
        pixels = f"pixels from {span}"
    reporter.warn(
        f"{source} comes without a preprocessing recipe; assuming {pixels}, {height} x {width} "
        "(or --preprocess)"
    )
    return recipe
