"""A source that is ONNX already: it is copied, not traced."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from regcache.export.recipe import at_resolution
from regcache.export.recipe_file import read_recipe, recipe_beside
from regcache.export.source import Reference
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess


def sidecar(path: Path) -> Path:
    """Where the recipe of an ONNX file lies: `encoder.onnx` -> `encoder.preprocess.json`."""
    return path.with_suffix(".preprocess.json")


@dataclass(frozen=True)
class OnnxFileSource:
    """`FILE.onnx`, with its recipe in the sidecar or in a library's own file beside it, if any."""

    name: str
    path: Path

    @classmethod
    def open(cls, text: str) -> Self:
        """Raises InputError when there is no such file."""
        path = Path(text).expanduser()
        if not path.is_file():
            raise InputError(f"{text}: no such file")
        return cls(text, path)

    def export(
        self, path: Path, *, resolution: int | None = None, own_recipe: bool = True
    ) -> Preprocess | None:
        """Copy the file and its external data to `path`; the graph is not looked at.

        `own_recipe`: whether to look for one, which need not be good where another is given.
        Raises InputError when a resolution is asked for, when the file is not ONNX, when its
        external data is missing or lies outside its folder, or when the sidecar is no recipe.
        """
        if resolution is not None:
            raise InputError(f"{self.name}: the resolution of an ONNX file is fixed")
        recipe = self._recipe(resolution) if own_recipe else None
        if path.resolve() == self.path.resolve():
            return recipe
        for location in sorted(_external_files(self.path)):
            copy = path.parent / location
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.path.parent / location, copy)
            except OSError as error:
                raise InputError(f"{self.name}: external data {location}: {error}") from error
        shutil.copyfile(self.path, path)
        return recipe

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """None: an ONNX file is its own original."""
        return None

    def _recipe(self, resolution: int | None) -> Preprocess | None:
        file = sidecar(self.path)
        recipe = read_recipe(file) if file.is_file() else recipe_beside(self.path)
        return None if recipe is None else at_resolution(recipe, resolution)


def _external_files(path: Path) -> set[str]:
    """The files that the weights lie in, relative to the model's folder."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX file, or truncated") from error
    locations = {ExternalDataInfo(t).location for t in _tensors(model.graph) if _is_external(t)}
    for location in locations:
        relative = PurePosixPath(location)
        if not location or relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"{path}: external data outside the model's folder: {location!r}")
    return locations


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(uses_external_data(tensor))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a graph: initializers, attributes and those of subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)
