"""A source that is ONNX already: it is rewritten, not traced."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from regcache.export.adopt import Adopted, adopt
from regcache.export.recipe import at_resolution
from regcache.export.recipe_file import read_recipe, recipe_beside
from regcache.export.reference import Processor, Reference
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import save_graph
from regcache.passes.preprocess import Preprocess


def sidecar(path: Path) -> Path:
    """Where the recipe of an ONNX file lies: `encoder.onnx` -> `encoder.preprocess.json`."""
    return path.with_suffix(".preprocess.json")


@dataclass(frozen=True)
class OnnxFileSource:
    """`FILE.onnx`, with its recipe in the sidecar beside it if there is one."""

    name: str
    path: Path

    @classmethod
    def open(cls, text: str) -> Self:
        """Raises InputError when there is no such file."""
        path = Path(text).expanduser()
        if not path.is_file():
            raise InputError(f"{text}: no such file")
        return cls(text, path)

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the encoder to `path` in our own form (see adopt); returns its recipe.

        Weights past 2 GB go to `NAME.onnx.data`. Raises InputError, naming the source, where the
        file or its recipe cannot be used, or the resolution is not one that it computes at.
        """
        recipe = self.recipe(resolution)
        save_graph(self.adopt(resolution, recipe).graph, path)
        return recipe

    def adopt(
        self, resolution: int | None, recipe: Preprocess | None, *, free_batch: bool = True
    ) -> Adopted:
        """The graph in our own form; `recipe` gives the size that the file leaves open.

        Raises InputError, naming the source, as adopt does.
        """
        size = None if recipe is None else (recipe.height, recipe.width)
        try:
            return adopt(self.path, resolution=resolution, size=size, free_batch=free_batch)
        except InputError as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            raise InputError(f"{self.name}: {reason}") from error

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """None: an ONNX file is its own original."""
        return None

    def processor(self, *, resolution: int | None = None) -> Processor | None:
        """None: an ONNX file has no library."""
        return None

    def recipe(self, resolution: int | None = None) -> Preprocess | None:
        """The recipe in the sidecar or beside the file, at that resolution; None without one.

        Raises InputError where it cannot be used.
        """
        file = sidecar(self.path)
        recipe = read_recipe(file) if file.is_file() else recipe_beside(self.path)
        return None if recipe is None else at_resolution(recipe, resolution)
