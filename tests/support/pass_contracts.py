"""Every pass with the encoder that it is given, and the facts that it is given with it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
from support.balancing import random_balances
from support.block_weights import block_weights
from support.canonical import canonical_graph
from support.equalizing import random_factors
from support.quantized_graphs import quantized
from support.registers import random_kv, random_tokens
from support.scales import (
    attention_scales,
    block_scales,
    float8_scales,
    image_scales,
    linear_scales,
)
from support.shifting import random_shifts
from support.spellings import SPELLINGS
from support.tiny_vit import TinyVit, with_batch

from regcache.passes.balance_scores import BalanceScores
from regcache.passes.base import Pass, run
from regcache.passes.block_floats import BlockFormat
from regcache.passes.bound_hidden import BoundHidden
from regcache.passes.canonicalize import canonicalize_graph
from regcache.passes.check import check_and_infer
from regcache.passes.copy_graph import copy_graph
from regcache.passes.correct_bias import CorrectBias
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.drop_identities import DropIdentities
from regcache.passes.drop_masks import DropMasks
from regcache.passes.drop_neutral import DropNeutral
from regcache.passes.equalize import Equalize
from regcache.passes.errors import InputError
from regcache.passes.expand_block_floats import ExpandBlockFloats
from regcache.passes.factor_rotation import FactorRotation
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.fold_constants import FoldConstants
from regcache.passes.fold_if import FoldIf
from regcache.passes.fold_stream_rotation import FoldStreamRotation
from regcache.passes.free_batch import FreeBatch
from regcache.passes.free_tokens import FreeTokens
from regcache.passes.fuse_attention import FuseAttention
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.fuse_gelu import FuseGelu
from regcache.passes.fuse_layer_norm import FuseLayerNorm
from regcache.passes.fuse_rms_norm import FuseRmsNorm
from regcache.passes.fuse_softmax import FuseSoftmax
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.keep_bias_apart import KeepBiasApart
from regcache.passes.keep_norm_apart import KeepNormApart
from regcache.passes.keep_vision import KeepVision
from regcache.passes.lower_einsum import LowerEinsum
from regcache.passes.lower_sequences import LowerSequences
from regcache.passes.merge_qkv import MergeQkv
from regcache.passes.merge_transposes import MergeTransposes
from regcache.passes.move_hidden import MoveHidden
from regcache.passes.observe import Observe
from regcache.passes.onnx_file import import_graph
from regcache.passes.pack_weights import PackWeights
from regcache.passes.patches_as_linear import PatchesAsLinear
from regcache.passes.pin_image import PinImage
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.quantize_block_floats import QuantizeBlockFloats
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.quantize_patches import QuantizePatches
from regcache.passes.raise_opset import raise_opset
from regcache.passes.resolve_shapes import ResolveShapes
from regcache.passes.rotate_hidden import RotateHidden
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotate_values import RotateValues
from regcache.passes.round_before_moving import RoundBeforeMoving
from regcache.passes.round_weights import RoundWeights
from regcache.passes.shift_activations import ShiftActivations
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters
from regcache.passes.split_gemm import SplitGemm
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.strip_registers import StripRegisters
from regcache.passes.to_float32 import ToFloat32
from regcache.passes.turn_keys_last import TurnKeysLast
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft

Prepare = Callable[[str], gs.Graph]


@cache
def _written(spelling: str) -> gs.Graph:
    graph = import_graph(raise_opset(TinyVit(SPELLINGS[spelling]).model()))
    check_and_infer(graph)
    # graphsurgeon writes a constant that it has read in other bytes than one that it has not.
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Constant):
                assert value.values is not None
    return graph


@cache
def _canonical(spelling: str) -> gs.Graph:
    return canonicalize_graph(copy_graph(_written(spelling)))


@cache
def _integers(spelling: str) -> gs.Graph:
    return quantized(_canonical(spelling))


def written(spelling: str) -> gs.Graph:
    """As the exporter writes it, its shapes inferred."""
    return copy_graph(_written(spelling))


def canonical(spelling: str) -> gs.Graph:
    """As the encoder view reads it."""
    return copy_graph(_canonical(spelling))


def integers(spelling: str) -> gs.Graph:
    """With Q/DQ pairs for ONNX Runtime."""
    return copy_graph(_integers(spelling))


def integer_scores(spelling: str) -> gs.Graph:
    """With Q/DQ pairs before q k^T, as for OpenVINO."""
    graph = canonical(spelling)
    return run(QuantizeAttention(attention_scales(graph), only_scores=True), graph).graph


def integer_patches(spelling: str) -> gs.Graph:
    """With Q/DQ pairs around the patch convolution."""
    graph = canonical(spelling)
    return run(QuantizePatches(image_scales(graph)), graph).graph


def nvfp4(_: str, graph: gs.Graph) -> Pass:
    return QuantizeBlockFloats(block_scales(graph, BlockFormat.NVFP4))


def in_blocks(spelling: str) -> gs.Graph:
    """With floats that share scales in blocks of 16."""
    graph = canonical(spelling)
    return run(nvfp4(spelling, graph), graph).graph


def fixed(spelling: str) -> gs.Graph:
    """Of a batch of 2 images."""
    return canonical_graph(with_batch(TinyVit(SPELLINGS[spelling]).model(), 2))


def turned(spelling: str) -> gs.Graph:
    """With the residual stream rotated, where it can be."""
    return run(RotateStream(), canonical(spelling)).graph


def registers(spelling: str) -> gs.Graph:
    """With registers in both blocks."""
    graph = canonical(spelling)
    return run(splice_kv(spelling, graph), graph).graph


def with_token(spelling: str) -> gs.Graph:
    """With a token that runs along to the end, where the encoder takes one."""
    spec, graph = SPELLINGS[spelling], canonical(spelling)
    token = np.zeros((1, spec.width), np.float32)
    with suppress(InputError):
        return run(SpliceRegisterTokens(0, spec.depth, token), graph).graph
    return graph


def corrections(_: str, graph: gs.Graph) -> Pass:
    linears = view_encoder(graph).linears
    return CorrectBias({linear.name: np.ones(linear.weight_shape[1], "f4") for linear in linears})


def splice_kv(spelling: str, _: gs.Graph) -> Pass:
    spec = SPELLINGS[spelling]
    return SpliceRegisters(0, spec.depth, *random_kv(spec, spec.depth, 3))


def observe_sites(_: str, graph: gs.Graph) -> Pass:
    return Observe(tuple(site.tensor.name for site in view_encoder(graph).sites))


@dataclass(frozen=True)
class Contract:
    """A pass with what it is given, and the encoder that it is given to."""

    prepare: Prepare
    make: Callable[[str, gs.Graph], Pass]
    adds: bool = False  # a second run does to the encoder what the first did, once more


def on(prepare: Prepare, kind: Callable[[], Pass]) -> Contract:
    """A pass that takes nothing."""
    return Contract(prepare, lambda _spelling, _graph: kind())


CONTRACTS: dict[type, Contract] = {
    BalanceScores: Contract(
        canonical, lambda _, graph: BalanceScores(random_balances(graph)), adds=True
    ),
    BoundHidden: on(canonical, BoundHidden),
    CorrectBias: Contract(canonical, corrections, adds=True),
    DeleteSinks: Contract(canonical, lambda _spelling, _graph: DeleteSinks(1, 2)),
    DropIdentities: on(written, DropIdentities),
    DropMasks: on(written, DropMasks),
    DropNeutral: Contract(
        written,
        lambda _, graph: DropNeutral(
            frozenset(name for name, item in graph.tensors().items() if not item.inputs)
        ),
    ),
    Equalize: Contract(canonical, lambda _, graph: Equalize(random_factors(graph)), adds=True),
    ExpandBlockFloats: on(in_blocks, ExpandBlockFloats),
    FactorRotation: on(turned, FactorRotation),
    FoldBiases: on(canonical, FoldBiases),
    FoldConstants: on(written, FoldConstants),
    FoldIf: on(written, FoldIf),
    FoldStreamRotation: on(turned, FoldStreamRotation),
    FreeBatch: on(fixed, FreeBatch),
    FreeTokens: on(written, FreeTokens),
    FuseAttention: on(integers, FuseAttention),
    FuseBiases: on(integers, FuseBiases),
    FuseGelu: on(written, FuseGelu),
    FuseLayerNorm: on(written, FuseLayerNorm),
    FuseRmsNorm: on(written, FuseRmsNorm),
    FuseSoftmax: on(written, FuseSoftmax),
    HalfPrecision: on(integers, HalfPrecision),
    KeepBiasApart: on(integers, KeepBiasApart),
    KeepNormApart: on(integers, KeepNormApart),
    KeepVision: Contract(written, lambda _, graph: KeepVision(graph.inputs[0].name)),
    LowerEinsum: on(written, LowerEinsum),
    LowerSequences: on(written, LowerSequences),
    MergeQkv: on(integers, MergeQkv),
    MergeTransposes: on(written, MergeTransposes),
    Observe: Contract(canonical, observe_sites),
    MoveHidden: Contract(with_token, lambda _spelling, _graph: MoveHidden(((0, 3), (0, 20)))),
    PackWeights: Contract(canonical, lambda _, graph: PackWeights(block_weights(graph))),
    PatchesAsLinear: on(integer_patches, PatchesAsLinear),
    PinImage: Contract(
        written,
        lambda _, graph: PinImage((2, *graph.inputs[0].shape[1:])),
    ),
    QuantizeAttention: Contract(
        canonical, lambda _, graph: QuantizeAttention(attention_scales(graph))
    ),
    QuantizeBlockFloats: Contract(canonical, nvfp4),
    QuantizeFloat8: Contract(canonical, lambda _, graph: QuantizeFloat8(float8_scales(graph))),
    QuantizeLinears: Contract(canonical, lambda _, graph: QuantizeLinears(linear_scales(graph))),
    QuantizePatches: Contract(canonical, lambda _, graph: QuantizePatches(image_scales(graph))),
    ResolveShapes: on(written, ResolveShapes),
    RotateHidden: Contract(canonical, lambda _spelling, _graph: RotateHidden(4)),
    RotateStream: on(canonical, RotateStream),
    RotateValues: Contract(canonical, lambda _spelling, _graph: RotateValues(), adds=True),
    RoundBeforeMoving: on(integers, RoundBeforeMoving),
    RoundWeights: on(canonical, RoundWeights),
    ShiftActivations: Contract(
        canonical, lambda _, graph: ShiftActivations(random_shifts(graph)), adds=True
    ),
    SignedIntegers: on(integers, SignedIntegers),
    SpliceRegisterTokens: Contract(
        canonical,
        lambda spelling, _: SpliceRegisterTokens(0, 2, random_tokens(SPELLINGS[spelling], 3)),
    ),
    SpliceRegisters: Contract(canonical, splice_kv),
    SplitGemm: on(written, SplitGemm),
    SplitQkv: on(canonical, SplitQkv),
    StripRegisters: on(registers, StripRegisters),
    ToFloat32: on(written, ToFloat32),
    TurnKeysLast: on(integer_scores, TurnKeysLast),
    UnfuseMicrosoft: on(written, UnfuseMicrosoft),
}
