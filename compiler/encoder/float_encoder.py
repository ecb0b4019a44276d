"""The float encoder between export and quantization, which stages take and return."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_graphsurgeon as gs

from regcache.compiler.encoder.pass_record import PassRecord, pass_records
from regcache.passes.base import Pass, PassRun, run_all
from regcache.passes.choose_outputs import OutputChoice
from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder
from regcache.passes.preprocess import Preprocess

RecipeFrom = Literal["source", "option", "assumed"]


@dataclass(frozen=True)
class FloatEncoder:
    """A float encoder: as exported, or after stages added registers, rotated or equalized it.

    `path`: its ONNX file as exported; `graph`: its present graph; `view`: of that graph.
    `recipe_from`: whether the recipe came with the source, from an option, or had to be assumed.
    `outputs`: which output is the embedding and which the hidden state. `passes`: what each pass
    did, from the file to the graph.
    """

    path: Path
    graph: gs.Graph
    view: EncoderView
    recipe: Preprocess
    recipe_from: RecipeFrom
    outputs: OutputChoice
    passes: tuple[PassRecord, ...] = ()

    def batch(self, wanted: int) -> int:
        """The batch size to run with: the graph's own where it is fixed."""
        shape = self.graph.inputs[0].shape
        return shape[0] if shape and isinstance(shape[0], int) else wanted

    def after(self, steps: Iterable[Pass]) -> "FloatEncoder":
        """The encoder after passes; itself where they change nothing and refuse nothing."""
        return self.rewritten(*run_all(steps, self.graph))

    def rewritten(self, graph: gs.Graph, ran: Iterable[PassRun]) -> "FloatEncoder":
        """The encoder with `graph`, which the passes of `ran` made of its own."""
        records = pass_records(ran)
        if graph is self.graph and not records:
            return self
        view = self.view if graph is self.graph else view_encoder(graph)
        return replace(self, graph=graph, view=view, passes=(*self.passes, *records))
