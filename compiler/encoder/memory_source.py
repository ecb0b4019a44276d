"""Sources that are objects in memory, torch.nn.Module and onnx.ModelProto, as ONNX files."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx

from regcache.compiler.reporter import Reporter
from regcache.export.onnx_message import write_message
from regcache.export.source import ONNX_MESSAGE, TORCH_MODULE
from regcache.export.torch_module import Computed, check_example, export_module
from regcache.passes.errors import InputError
from regcache.runtime.original import OriginalSession, relative_error

if TYPE_CHECKING:
    from torch import Tensor, nn

AnySource: TypeAlias = "str | os.PathLike[str] | nn.Module | onnx.ModelProto"
"""SOURCE as the command line takes it, or an object that lives in this process."""

_CLOSE, _CLOSE_IN_HALF = 1e-3, 5e-2
_FILE = "source.onnx"


@dataclass(frozen=True)
class NamedSource:
    """A source by its name, and the object in memory that has to be written to a file first.

    `name`: as the user wrote it, or made for an object: "torch.nn.Module NAME" with the name of its
    class, "onnx.ModelProto NAME" with that of its graph. `example`: the module's input.
    """

    name: str
    module: "nn.Module | None" = None
    example: "Tensor | None" = None
    message: onnx.ModelProto | None = None

    @classmethod
    def of(cls, source: object, example: object = None) -> "NamedSource":
        """Name a source and check it; nothing is run or written.

        `example`: for a torch.nn.Module, and only for one, a batch of images [B, 3, H, W] or [B, H,
        W, 3]. Raises InputError, in one line, for another type of source or an example that is no
        batch of images.
        """
        torch = sys.modules.get("torch")  # who has a module has imported it
        if torch is not None and isinstance(source, torch.nn.Module):
            module = getattr(source, "_orig_mod", source)  # what torch.compile was given
            name = f"{TORCH_MODULE} {type(module).__name__}"
            return cls(name, module=module, example=check_example(example))
        if example is not None:
            raise InputError("an example input is for a torch.nn.Module alone")
        if isinstance(source, onnx.ModelProto):
            return cls(f"{ONNX_MESSAGE} {source.graph.name}".rstrip(), message=source)
        if isinstance(source, (str, os.PathLike)):
            return cls(os.fspath(source))
        raise InputError(
            "a source is a path or a name, a torch.nn.Module or an onnx.ModelProto, "
            f"not a {type(source).__name__}"
        )

    def write(self, folder: Path, reporter: Reporter, *, threads: int | None = None) -> Path | None:
        """Write an object in memory to a file in `folder`; None for a source that is no object.

        What a module computes is compared with its file, run on that many `threads`. Raises
        InputError, beginning with the name, where it cannot be written, or the file computes
        something else.
        """
        path = folder / _FILE
        if self.message is not None:
            reporter.step(f"writing {self.name}")
            write_message(self.message, path, self.name)
            return path
        if self.module is None or self.example is None:
            return None
        reporter.step(f"tracing {self.name}")
        computed = export_module(self.module, self.example, path, self.name)
        _hold_against(computed, path, self.name, reporter, threads)
        return path


def _hold_against(
    computed: Computed, path: Path, name: str, reporter: Reporter, threads: int | None
) -> None:
    """Raise InputError where the file computes something else than the module; warn if unknown."""
    try:
        with OriginalSession(path, "pixel_values", threads=threads) as session:
            results = session.run(computed.images, list(computed.outputs), len(computed.images))
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        reporter.warn(f"{name}: could not be run to check its export: {reason}")
        return
    limit = _CLOSE_IN_HALF if computed.half else _CLOSE
    for (output, wanted), made in zip(computed.outputs.items(), results, strict=True):
        apart = relative_error(made, wanted)
        if apart > limit:
            raise InputError(
                f"{name}: exported, its output {output!r} differs by {apart:.1e} from the module's"
            )
