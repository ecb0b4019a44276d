"""An original that somebody holds in memory: a module, or a function that embeds a batch."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.parity.reference import Original
from regcache.passes.errors import InputError

Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class OwnOriginal:
    """What an artifact is compared with in place of what its manifest names.

    `run`: images as the artifact's recipe makes them -> outputs by name.
    """

    run: Callable[[NDArray[Any]], Outputs]

    @classmethod
    def of(cls, given: object) -> Self:
        """A torch.nn.Module, or a function of a batch that returns the embeddings [B, D].

        The function may return several arrays in a list or tuple, the embeddings first, or arrays
        by the artifact's names of outputs. Raises InputError for anything else.
        """
        torch = sys.modules.get("torch")  # who has a module has imported it
        if torch is not None and isinstance(given, torch.nn.Module):
            from regcache.export.torch_module import module_outputs

            module = given
            return cls(lambda images: module_outputs(module, images))
        if not callable(given):
            raise InputError(
                f"a {type(given).__name__} is no original: a torch.nn.Module, or a function of a "
                "batch of images, is wanted"
            )
        return cls(lambda images: _by_name(given(images)))

    def giving(self, names: Sequence[str]) -> Original:
        """The original that gives an artifact's outputs `names`, the embedding's first.

        An output that none is named like is found by its dimensions: the embedding is the first of
        two, or the only one; the tokens are the first of three.
        """

        def run(images: NDArray[Any]) -> list[NDArray[Any]]:
            found = self.run(images)
            if all(name in found for name in names):
                return [found[name] for name in names]
            return _by_dimensions(found)

        return Original("pytorch", run)


def _by_name(found: object) -> Outputs:
    if isinstance(found, Mapping):
        return {str(name): np.asarray(array) for name, array in found.items()}
    several = found if isinstance(found, (list, tuple)) else [found]
    return {str(index): np.asarray(array) for index, array in enumerate(several)}


def _by_dimensions(found: Outputs) -> list[NDArray[Any]]:
    arrays = list(found.values())
    vectors = [array for array in arrays if array.ndim == 2] or arrays[:1]
    if not vectors:
        raise InputError("the original gives no array with a row for each image")
    return [vectors[0], *[array for array in arrays if array.ndim == 3][:1]]
