"""Encoders whose outputs read middle blocks are searched by the error at all of these outputs."""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.many_outputs import many_outputs
from support.tiny_vit import Spec, TinyVit
from support.workbench_cases import (
    QUANTIZERS,
    Case,
    Floats,
    assert_errors,
    check_trial,
    random_tokens,
    run_named,
)

from regcache.compiler.curation.parts import Part, State
from regcache.compiler.curation.sensitivity import block_damage, site_damages
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.trial import Trial, try_setting
from regcache.compiler.curation.workbench import HeldStudy, Workbench
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears

SPEC = Spec(depth=3)
# Which blocks' inputs they need something from before of.
FORMS = {
    "tokens_first": (),
    "class_tokens": (2, 3),
    "shared_norm": (2, 3),
    "hidden_states": (2, 3),
    "running_sum": (2, 3),
    "maps": (2, 3),
}


@dataclass(frozen=True)
class ManyCase(Case):
    """A study of an encoder with these outputs; the truth is the whole graph, run in float."""

    counted: tuple[str, ...] = ()

    def errors(self, graph: gs.Graph, images: Floats) -> NDArray[np.float64]:
        """The mean over outputs of 1 - cosine."""
        names = list(self.counted)
        pairs = zip(run_named(graph, names, images), self.truth(images), strict=True)
        every = [_distances(found, wanted) for found, wanted in pairs]
        return np.asarray(np.mean(every, axis=0))

    def truth(self, images: Floats) -> list[Floats]:
        return run_named(self.graph, list(self.counted), images)


def _distances(found: Floats, wanted: Floats) -> NDArray[np.float64]:
    one, other = (item.reshape(len(item), -1).astype(np.float64) for item in (found, wanted))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray(1 - np.einsum("bc,bc->b", one, other) / lengths)


@cache
def make_case(form: str, batch: int | None = None) -> ManyCase:
    vit = TinyVit(SPEC)
    model = many_outputs(form, SPEC)
    free = graph = canonicalize(model)
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        graph = canonicalize(model)
    dealt = ReferenceImages.deal(vit.images(14))
    more = {"batch": 2, "sensitivity_images": 3, "screening_images": 3}
    study = Study.of(graph, dealt, QUANTIZERS["u8s8"], **more)
    return ManyCase(vit, free, study, choose_outputs(view_encoder(free)).counted)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_baseline_counts_every_output(form: str) -> None:
    case = make_case(form)
    workbench = case.workbench
    assert tuple(workbench.outputs) == case.counted
    assert tuple(block for block, names in enumerate(workbench.before) if names) == FORMS[form]
    quantized = case.quantized(case.graph)
    assert_errors(workbench.baseline, case.errors(quantized, case.study.images.rank))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "batch"), [("shared_norm", None), ("hidden_states", None), ("running_sum", 3)]
)
def test_damage_at_every_output(form: str, batch: int | None) -> None:
    """Also of a block that some outputs stand before."""
    case = make_case(form, batch)
    assert_damage(case, case.held, case.graph, block=1)


def assert_damage(case: ManyCase, held: HeldStudy, graph: gs.Graph, block: int) -> None:
    """Of one block alone, that of the whole encoder with it quantized."""
    step = case.step(graph)
    assert isinstance(step, QuantizeLinears)
    fit = held.study.images.fit
    tensors = {site.name: site.tensor.name for site in view_encoder(graph).sites}

    def damage(names: list[str], images: Floats) -> float:
        wanted = run_named(graph, list(case.counted), images)
        chosen = {tensors[name]: step.activations[tensors[name]] for name in names}
        some = replace(step, activations=chosen)
        found = run_named(run(some, graph).graph, list(case.counted), images)
        pairs = zip(found, wanted, strict=True)
        return float(np.mean([_distances(one, other) for one, other in pairs]))

    together = block_damage(held, block)
    names = list(together.sites)
    alone = site_damages(held, names)
    truth = [damage([name], fit[:3]) for name in names] + [damage(names, fit[:1])]
    assert_errors([*alone.values(), together.whole], np.array(truth))


SETTINGS = {
    "kv": Setting(candidates=(0, 1), start=1, end=3),
    "deletion": Setting(delete_at=1, delete_count=3),
    "deletion, then kv": Setting(candidates=(0,), start=2, end=3, delete_at=1, delete_count=2),
    "deletion at the end": Setting(delete_at=2, delete_count=2),
}
TOKENS = Setting(candidates=(0, 1), start=0, end=3, mode="token")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name", "batch"),
    [
        ("tokens_first", "deletion", None),
        ("class_tokens", "deletion", None),
        ("class_tokens", "kv", 3),
        ("shared_norm", "deletion at the end", None),
        ("hidden_states", "deletion, then kv", None),
        ("running_sum", "deletion at the end", None),
        ("maps", "kv", None),
    ],
)
def test_a_trial_is_the_whole_encoder_with_the_setting(
    form: str, name: str, batch: int | None
) -> None:
    check_trial(make_case(form, batch), SETTINGS[name])


@pytest.mark.parametrize(
    ("form", "setting", "reason"),
    [
        ("hidden_states", TOKENS, "registers: the output of block 0 leaves the encoder"),
        ("with_attention", TOKENS, "leaves the encoder"),
        ("with_attention", SETTINGS["kv"], "the attention of blocks.1 leaves the encoder"),
        ("with_attention", SETTINGS["deletion"], "sinks: a node behind needs every position"),
        ("maps", SETTINGS["deletion"], "sinks: Reshape .* behind needs every position"),
    ],
)
def test_what_would_change_an_output_is_refused(form: str, setting: Setting, reason: str) -> None:
    case = make_case(form)
    result = try_setting(case.held, Trial(setting, random_tokens(SPEC, setting.count)))
    assert re.search(reason, result.refused or "")


@pytest.mark.slow
def test_sensitivity_behind_deleted_sinks() -> None:
    """Outputs are put back in order by indices that are made where the sinks are deleted."""
    case = make_case("hidden_states")
    placed = case.placed(SETTINGS["deletion"], random_tokens(SPEC, 0))
    held = HeldStudy(replace(case.study, graph=placed, outputs=case.counted, key="placed"))
    kinds = {placed.tensors()[name].dtype for name in held.workbench().before[2]}
    assert np.dtype(np.int64) in kinds
    assert_damage(case, held, placed, block=2)


def test_a_part_of_known_outputs_alone() -> None:
    """Nothing is left to compute behind the last block that an output reads."""
    graph = make_case("hidden_states").graph
    first, second, *_ = [block.output.name for block in view_encoder(graph).blocks]
    part = Part.of(graph, second, [first, second])
    assert part.others == ()
    random = np.random.default_rng(0)
    one, other = (random.standard_normal((3, 10, 16)).astype(np.float32) for _ in range(2))
    with part.open() as compute:
        found: Any = compute(State(other, {first: one}), 2)
    assert [item is wanted for item, wanted in zip(found, (one, other), strict=True)] == [True] * 2


def test_an_output_without_the_batch_in_front() -> None:
    graph = make_case("tokens_first").graph.copy()
    turned = gs.Variable("turned", np.float32, [10, "batch", 16])
    (tokens, _) = graph.outputs
    graph.nodes.append(gs.Node("Transpose", "turn", {"perm": [1, 0, 2]}, [tokens], [turned]))
    graph.outputs = [turned]
    case = make_case("tokens_first")
    study = Study.of(graph, case.study.images, case.study.quantizer, outputs=("turned",))
    with pytest.raises(InputError, match="'turned' does not have the batch in front"):
        Workbench(study)
