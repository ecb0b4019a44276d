"""Tiny encoders on a workbench, and what a direct run says of them."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.number_formats import S8S8, U8S8, affines
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.observe import SiteStatistics, site_statistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.trial import Trial, decide_setting, try_setting
from regcache.compiler.curation.workbench import HeldStudy, Workbench
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, simulate
from regcache.passes.affine import Affine
from regcache.passes.base import Pass, run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.encoder import by_tensor
from regcache.passes.find_blocks import view_encoder
from regcache.passes.move_hidden import MoveHidden
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.round_weights import RoundWeights
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

Floats = NDArray[np.float32]
QUANTIZERS = {
    "u8s8": Quantizer(U8S8),
    "s8s8 min-max": Quantizer(S8S8, Calibrator.MIN_MAX),
    "w4a4": Quantizer(simulate(U8S8, Simulation.W4A4)),
    "w4a16": Quantizer(simulate(U8S8, Simulation.W4A16)),
}
SETTINGS = {
    "kv": Setting(candidates=(0, 1), start=1, end=3),
    "kv, first block": Setting(candidates=(0,), start=0, end=1),
    "kv, last block": Setting(candidates=(0,) * 4, start=2, end=3),
    "token": Setting(candidates=(0, 1), start=1, end=2, mode="token"),
    "token to the end": Setting(candidates=(0,), start=1, end=3, mode="token"),
    "deletion": Setting(delete_at=1, delete_count=3),
    "deletion, then kv": Setting(candidates=(0,), start=2, end=3, delete_at=1, delete_count=2),
    "kv, then deletion": Setting(candidates=(0,), start=1, end=2, delete_at=2, delete_count=2),
    "moved units": Setting(moved=((0, 3), (1, 30))),
    "nothing": Setting(),
}
# The batch that the graph fixes; the studies ask for 2, so that every one leaves a rest.
BATCHES = {"dynamic batch": None, "batch of 1": 1, "batch of 3": 3}
SPEC = Spec(depth=3)


@dataclass(frozen=True)
class Case:
    """A study of a tiny encoder, and the encoder with a dynamic batch, to compute all anew."""

    vit: TinyVit
    graph: gs.Graph
    study: Study

    @cached_property
    def held(self) -> HeldStudy:
        """The study as workers hold it."""
        return HeldStudy(self.study)

    @property
    def workbench(self) -> Workbench:
        """The workbench of the study, made once."""
        return self.held.workbench()

    def references(self, images: Floats) -> NDArray[np.float64]:
        """The pooled output in float64, from the formula."""
        return np.asarray(self.vit.reference(images)[0], dtype=np.float64)

    def errors(self, graph: gs.Graph, images: Floats) -> NDArray[np.float64]:
        """1 - cosine of a graph's pooled output to the formula's."""
        found = run_named(graph, ["pooled"], images)[0].astype(np.float64)
        wanted = self.references(images)
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        return np.asarray(1 - np.einsum("bc,bc->b", found, wanted) / lengths)

    def quantized(self, graph: gs.Graph) -> gs.Graph:
        """The whole graph, calibrated on the `fit` images and quantized."""
        return run(self.step(graph), graph).graph

    def step(self, graph: gs.Graph) -> Pass:
        target = self.study.quantizer.target
        if target.activation_bits is None:
            return RoundWeights(target.weight_bits)
        sites = view_encoder(graph).sites
        chosen = affines(self.study.quantizer.scales(sites, self.statistics(graph)))
        return QuantizeLinears(by_tensor(sites, chosen), target.weight_dtype, target.weight_bits)

    def statistics(self, graph: gs.Graph) -> dict[str, SiteStatistics]:
        """Of every site of the whole graph in float, on all `fit` images at once."""
        images, view = self.study.images.fit, view_encoder(graph)
        statistics = site_statistics(view, len(images), self.study.seed)
        found = run_named(graph, [site.tensor.name for site in view.sites], images)
        for site, activation in zip(view.sites, found, strict=True):
            statistics[site.name].update(activation)
        return statistics

    def placed(self, setting: Setting, tokens: Floats) -> gs.Graph:
        """The whole graph with a setting; keys and values from the float64 formula."""
        graph = self.graph
        start, end = setting.start, setting.end
        if setting.delete_count:
            graph = run(DeleteSinks(setting.delete_at, setting.delete_count), graph).graph
        if setting.candidates and setting.mode == "token":
            return run(SpliceRegisterTokens(start, end, tokens), graph).graph
        if setting.candidates:
            operands = self.vit.capture(tokens, start, end)
            keys, values = (item.astype(np.float32) for item in operands)
            return run(SpliceRegisters(start, end, keys, values), graph).graph
        if setting.moved:
            token = np.zeros((1, self.vit.spec.width), np.float32)
            start = min(block for block, _ in setting.moved)
            graph = run(SpliceRegisterTokens(start, self.vit.spec.depth, token), graph).graph
            return run(MoveHidden(setting.moved), graph).graph
        return graph


@functools.cache
def make_case(
    spec: Spec = SPEC, quantizer: str = "u8s8", batch: int | None = None, images: int = 14
) -> Case:
    vit = TinyVit(spec)
    model = vit.model()
    free = graph = canonicalize(model)
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        graph = canonicalize(model)
    dealt = ReferenceImages.deal(vit.images(images))
    more = {"batch": 2, "sensitivity_images": 3, "screening_images": 3}
    return Case(vit, free, Study.of(graph, dealt, QUANTIZERS[quantizer], **more))


def assert_scales(found: Mapping[str, Affine], wanted: Mapping[str, Affine]) -> None:
    assert found.keys() == wanted.keys()
    for name, scale in found.items():
        assert scale.zero_point == wanted[name].zero_point
        assert scale.scale == pytest.approx(wanted[name].scale, rel=1e-5)
        assert (scale.dtype, scale.bits) == (wanted[name].dtype, wanted[name].bits)


def run_named(graph: gs.Graph, names: list[str], images: Floats) -> list[Floats]:
    """Tensors of a whole graph, by name, for all images at once."""
    part = graph.copy()
    tensors = part.tensors()
    part.outputs = [tensors[name] for name in names]
    for tensor in part.outputs:
        tensor.dtype = np.dtype(np.float32)
    return run_graph(part.cleanup().toposort(), images)


def random_tokens(spec: Spec, count: int, seed: int = 0) -> Floats:
    shape = (count, spec.width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_errors(found: Any, wanted: NDArray[np.float64]) -> None:
    """Equal, but for the image in which float rounding moves a number across a tie."""
    assert len(found) == len(wanted) > 1
    assert (wanted > 1e-7).all()
    apart = np.abs(np.asarray(found) / wanted - 1)
    assert np.mean(apart < 1e-3) > 0.5
    assert apart.max() < 0.5


def check_trial(case: Case, setting: Setting) -> None:
    """Tried and decided on, a setting has the errors of the whole encoder with it."""
    tokens = random_tokens(case.vit.spec, setting.count)
    quantized = case.quantized(case.placed(setting, tokens))
    images = case.study.images
    for function, some in ((try_setting, images.rank), (decide_setting, images.decide)):
        result = function(case.held, Trial(setting, tokens))
        assert result.refused is None
        assert_errors(result.errors, case.errors(quantized, some))
        assert result.mean == pytest.approx(np.mean(result.errors))
