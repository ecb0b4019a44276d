"""Random registers, and graphs that hold them."""

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.spellings import SPELLINGS
from support.tiny_vit import Spec

from regcache.compiler.curation.registers import capture_registers
from regcache.passes.base import run
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.encoder import EncoderView
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

RANGES = [(0, 1), (0, 2), (1, 2)]
# Heads merged with the batch name the number of tokens: K and V can grow there, tokens cannot.
FREE = [name for name in SPELLINGS if name != "merged heads"]
FORMS = ("kv", "token", "delete", "kv and delete")


def random_tokens(spec: Spec, count: int, seed: int = 0) -> NDArray[np.float32]:
    shape = (count, spec.width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_kv(spec: Spec, blocks: int, count: int, seed: int = 0) -> list[NDArray[np.float32]]:
    shape = (blocks, spec.heads, count, spec.width // spec.heads)
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for _ in "kv"]


def with_registers(view: EncoderView, form: str) -> gs.Graph:
    """Four registers and five deleted sinks from the middle block on."""
    start, end = len(view.blocks) // 2, len(view.blocks)
    tokens = np.random.default_rng(0).standard_normal((4, view.width)).astype(np.float32)
    graph = view.graph
    if "delete" in form:
        graph = run(DeleteSinks(start, 5), graph).graph
    if "kv" in form:
        keys, values = capture_registers(view, start, end, tokens)
        graph = run(SpliceRegisters(start, end, keys, values), graph).graph
    if form == "token":
        graph = run(SpliceRegisterTokens(start, end, tokens), graph).graph
    return graph
