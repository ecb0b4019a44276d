"""Parity of the hidden states behind each block, which shows where an error arises."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.shape_inference import infer_shapes

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.calibration.graph_session import open_graph
from regcache.compiler.calibration.statistics import tokens_per_image
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.onnx_file import load_model, save_model
from regcache.passes.rotated_stream import matrix_in
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import CPU, Device
from regcache.runtime.images import ImageFolder
from regcache.runtime.session import OrtSession
from regcache.runtime.tensor_parity import TensorMeter, TensorParity

Floats = NDArray[np.floating]

BLOCKS = "comparing blocks"


def compare_blocks(
    artifact: Artifact,
    folder: ImageFolder,
    reporter: Reporter,
    *,
    float_model: bool = False,
    threads: int | None = None,
    device: Device = CPU,
) -> list[TensorParity]:
    """Compare the output of every block of the artifact with the float ONNX's, in order.

    Both run once more with these tensors as outputs, the float ONNX in its canonical form;
    `float_model` compares that with the file as it is. Tokens that only one of them has are left
    out: registers, and behind deleted sinks, where patches change places, all patches (without a
    token in front of them, their mean is compared). Raises InputError where there is no float.onnx,
    or a block's output is not in the model.
    """
    reporter.begin(BLOCKS)
    model = artifact.float_model if float_model else artifact.model
    integers = artifact.runs_integers or float_model
    graph = canonicalize(load_model(artifact.float_model))
    view = view_encoder(graph)
    names = [block.output.name for block in view.blocks]
    ranks = {block.output.name: len(block.output.shape or ()) for block in view.blocks}
    prefix = view.prefix_tokens or 0
    meters = [TensorMeter(f"blocks.{block.index}") for block in view.blocks]
    with ExitStack() as sessions:
        observed = run(Observe(tuple(names)), graph).graph
        reference = open_graph(observed, threads=threads, device=device)
        sessions.enter_context(reference)
        del graph, observed, view  # the session has copies of the weights
        scratch = sessions.enter_context(temporary_folder())
        turn = _observe(model, ranks, scratch / model.name)
        candidate = sessions.enter_context(
            OrtSession(
                scratch / model.name,
                threads=threads,
                integers=integers,
                device=CPU if artifact.runs_integers and not float_model else device,
            )
        )
        for batch in reporter.images(folder, len(folder.paths), BLOCKS):
            wanted, made = (
                _hidden_states(session, names, batch.images) for session in (reference, candidate)
            )
            if turn is not None:
                made = [*(hidden @ turn.T for hidden in made[:-1]), made[-1]]
            for meter, truth, found in zip(meters, wanted, made, strict=True):
                meter.update(*_same_tokens(truth, found, prefix))
    return [meter.result() for meter in meters]


def _observe(model: Path, ranks: Mapping[str, int], path: Path) -> Floats | None:
    """Write the model to `path` with the tensors that `ranks` names as further outputs.

    Returns what its residual stream is rotated by, if it is.
    """
    proto = onnx.load(model)
    made = {name for node in proto.graph.node for name in node.output}
    missing = [name for name in ranks if name not in made]
    if missing:
        raise InputError(f"{model}: no tensor {missing[0]!r}: its blocks are not float.onnx's")
    present = {output.name for output in proto.graph.output}
    wanted = [name for name in ranks if name not in present]
    typed = {info.name: info for info in proto.graph.value_info}
    if not typed.keys() >= set(wanted):  # somebody else's file
        typed = {info.name: info for info in infer_shapes(proto).graph.value_info}
    proto.graph.output.extend(_output(typed.get(name), name, ranks[name]) for name in wanted)
    save_model(proto, path)
    return matrix_in(proto)


def _output(info: onnx.ValueInfoProto | None, name: str, rank: int) -> onnx.ValueInfoProto:
    """A tensor as an output, which needs a shape; behind operators not ONNX's none is inferred."""
    if info is not None and info.type.tensor_type.HasField("shape"):
        return info
    dtype = onnx.TensorProto.FLOAT if info is None else info.type.tensor_type.elem_type
    return onnx.helper.make_tensor_value_info(name, dtype, [None] * rank)


def _hidden_states(session: OrtSession, names: Sequence[str], images: Floats) -> list[Floats]:
    """The tensors `names`, each [B, T, C]."""
    count = len(images)
    images = session.filled(images)
    outputs = dict(zip(session.output_names, session.run(images), strict=True))
    return [tokens_per_image(outputs[name], len(images))[:count] for name in names]


def _same_tokens(truth: Floats, candidate: Floats, prefix: int) -> tuple[Floats, Floats]:
    """The tokens that both sequences [B, T, C] have, in the same places."""
    if candidate.shape[1] >= truth.shape[1]:  # registers stand behind all others
        return truth, candidate[:, : truth.shape[1]]
    if prefix:
        return truth[:, :prefix], candidate[:, :prefix]
    return truth.mean(axis=1, keepdims=True), candidate.mean(
        axis=1, keepdims=True, dtype=np.float32
    )
