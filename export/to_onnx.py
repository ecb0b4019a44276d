"""Trace a tower with PyTorch's exporter and write it as one clean ONNX file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regcache.export.extras import quiet, uncollected
from regcache.export.save_onnx import save_model
from regcache.export.tower import Tower

if TYPE_CHECKING:
    import onnx_ir
    from torch import Tensor, nn

OPSET = 20


def write_onnx(load: Callable[[], Tower], path: Path) -> None:
    """Export the tower that `load` returns: "pixel_values" -> "pooled", "last_hidden_state".

    The batch is dynamic, everything else static. Weights past 2 GB go to `NAME.onnx.data`.
    The tower is loaded here so that no caller keeps its weights alive while they are written.
    """
    import onnx

    save_model(_trace(load()), path)
    onnx.checker.check_model(str(path), full_check=True)


def _trace(tower: Tower) -> "onnx_ir.Model":
    import torch

    tower.module.requires_grad_(False)
    with torch.no_grad(), quiet():
        tower.freeze()
        images = torch.zeros(2, 3, tower.height, tower.width)  # a batch of 1 would be baked in
        return trace(_as_module(tower), images, ["pooled", "last_hidden_state"])


def trace(module: "nn.Module", images: "Tensor", outputs: Sequence[str]) -> "onnx_ir.Model":
    """The graph of a module of one parameter, `images`: "pixel_values" -> `outputs`.

    `images`: two or more; their number is left free. Raises what PyTorch's exporter raises.
    """
    import torch

    with uncollected():
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=list(outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _strip_traces(program.model)
    return program.model


def _as_module(tower: Tower) -> "nn.Module":
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = tower.module

        def forward(self, images: "Tensor") -> "tuple[Tensor, Tensor]":
            return tower.outputs(images)

    return Encoder().eval()


def _strip_traces(model: "onnx_ir.Model") -> None:
    """Drop the exporter's stack traces: they hold the paths of this machine."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
