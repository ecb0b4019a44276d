"""What passes write, as text: the nodes that go and those that come, on one tiny encoder each."""

import os
from collections import Counter
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest
from support.pass_contracts import CONTRACTS

from regcache.passes.balance_scores import BalanceScores
from regcache.passes.base import run
from regcache.passes.bound_hidden import BoundHidden
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.equalize import Equalize
from regcache.passes.expand_block_floats import ExpandBlockFloats
from regcache.passes.factor_rotation import FactorRotation
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.fuse_attention import FuseAttention
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.fuse_gelu import FuseGelu
from regcache.passes.fuse_layer_norm import FuseLayerNorm
from regcache.passes.fuse_rms_norm import FuseRmsNorm
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.lower_einsum import LowerEinsum
from regcache.passes.merge_qkv import MergeQkv
from regcache.passes.move_hidden import MoveHidden
from regcache.passes.pack_weights import PackWeights
from regcache.passes.patches_as_linear import PatchesAsLinear
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.quantize_block_floats import QuantizeBlockFloats
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_patches import QuantizePatches
from regcache.passes.rotate_hidden import RotateHidden
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotate_values import RotateValues
from regcache.passes.round_before_moving import RoundBeforeMoving
from regcache.passes.shift_activations import ShiftActivations
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters
from regcache.passes.split_gemm import SplitGemm
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.turn_keys_last import TurnKeysLast

FOLDER = Path(__file__).parents[1] / "golden"
SPELLING = {
    BalanceScores: "plain",
    BoundHidden: "plain",
    DeleteSinks: "plain",
    Equalize: "plain",
    ExpandBlockFloats: "plain",
    FactorRotation: "plain",
    FoldBiases: "plain",
    FuseAttention: "plain",
    FuseBiases: "plain",
    FuseGelu: "erf reciprocal",
    FuseLayerNorm: "erf reciprocal",
    FuseRmsNorm: "rms norm",
    HalfPrecision: "plain",
    LowerEinsum: "einsum",
    MergeQkv: "plain",
    MoveHidden: "plain",
    PackWeights: "plain",
    PatchesAsLinear: "plain",
    QuantizeAttention: "plain",
    QuantizeBlockFloats: "plain",
    QuantizeFloat8: "plain",
    QuantizePatches: "plain",
    RotateHidden: "plain",
    RotateStream: "plain",
    RotateValues: "plain",
    RoundBeforeMoving: "plain",
    ShiftActivations: "plain",
    SignedIntegers: "plain",
    SpliceRegisterTokens: "plain",
    SpliceRegisters: "plain",
    SplitGemm: "gemm",
    SplitQkv: "fused qkv",
    TurnKeysLast: "plain",
}


def nodes(graph: gs.Graph) -> list[str]:
    """One line for each node, without the weights, in the graph's order."""
    text = onnx.printer.to_text(gs.export_onnx(graph).graph)
    return [line.strip() for line in text.splitlines() if " = " in line and "{" not in line]


def difference(before: gs.Graph, after: gs.Graph) -> list[str]:
    """Lines of the nodes that are gone (-), then of those that are new or read anew (+)."""
    old, new = nodes(before), nodes(after)
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    return [f"- {line}" for line in old if line in gone] + [
        f"+ {line}" for line in new if line in come
    ]


@pytest.mark.parametrize("kind", SPELLING, ids=lambda kind: kind.__name__)
def test_golden_text(kind: type) -> None:
    """Set REGCACHE_GOLDEN=1 to write the text anew after a wanted change."""
    contract, spelling = CONTRACTS[kind], SPELLING[kind]
    graph = contract.prepare(spelling)
    step = contract.make(spelling, graph)
    lines = difference(graph, run(step, graph).graph)
    assert lines
    path = FOLDER / f"{step.name}.diff"
    if os.environ.get("REGCACHE_GOLDEN"):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == path.read_text(encoding="utf-8").splitlines()
