"""Curation finds what was planted: the block, the tokens, and a register that removes them.

Left halves of the photographs calibrate and rank, right halves decide.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.planted import PEAK, Planting
from support.planted_photos import halves, model_graph, natural, planted
from support.running import run_graph

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation import workbench
from regcache.compiler.curation.curate import Curated, curate
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.trial import Trial, decide_setting
from regcache.compiler.curation.workbench import HeldStudy
from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import TargetName, resolve_target
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe

pytestmark = [pytest.mark.sample, pytest.mark.xdist_group("planted")]

CPU = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False)
CASES = [
    (Planting(block=5, seed=2), Quantizer(CPU, Calibrator.MIN_MAX)),
]
NAMES = ["w8a8"]


@cache
def planted_graph(planting: Planting) -> gs.Graph:
    return model_graph(planted(planting).model)


def study_of(graph: gs.Graph, quantizer: Quantizer) -> Study:
    left = halves(0, 5).numpy()
    images = ReferenceImages(left[0::2], left[1::4], halves(1, 9).numpy())
    return Study.of(graph, images, quantizer, sites_alone=Breadth().sites_alone(0.95))


@cache
def curated(planting: Planting, quantizer: Quantizer, journal: Path) -> Curated:
    study = study_of(planted_graph(planting), quantizer)
    return curate(study, SearchOptions(journal), Reporter())


@cache
def natural_error(quantizer: Quantizer) -> float:
    """Of the un-planted DINOv2-S, quantized the same way."""
    nothing = Trial(Setting(), np.zeros((0, 384), np.float32))
    study = study_of(model_graph(natural()), quantizer)
    return decide_setting(HeldStudy(study), nothing).mean


@pytest.fixture(scope="module", autouse=True)
def kept_memory() -> Iterator[None]:
    """To give it back behind every setting takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "return_memory", lambda _: None)
        yield


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curation") / "journal"


@pytest.mark.parametrize(("planting", "quantizer"), CASES, ids=NAMES)
def test_the_planted_layer_is_the_most_sensitive(
    planting: Planting, quantizer: Quantizer, journal: Path
) -> None:
    record = curated(planting, quantizer, journal).record
    assert record.sensitive_block == planting.block
    worst = max(record.sensitivity, key=lambda site: site.damage)
    assert worst.site == f"blocks.{planting.block}.fc2"
    assert worst.channel == planted(planting).unit
    assert worst.holder == "patch"
    assert worst.outlier_ratio > 10
    assert np.argmax(record.block_damage) == planting.block
    norms = record.streams
    assert norms[planting.block + 1].maximum > 2 * norms[planting.block].maximum


@pytest.mark.parametrize(("planting", "quantizer"), CASES, ids=NAMES)
def test_candidates_are_universal(planting: Planting, quantizer: Quantizer, journal: Path) -> None:
    found = curated(planting, quantizer, journal).record.universality
    assert found is not None
    assert found.outliers >= 2
    assert found.largest > 0.75
    assert found.ordinary < 0.4


@pytest.mark.parametrize(("planting", "quantizer"), CASES, ids=NAMES)
def test_registers_close_the_gap(planting: Planting, quantizer: Quantizer, journal: Path) -> None:
    found = curated(planting, quantizer, journal)
    assert found.setting.count
    assert found.record.improvement is not None
    without, shipped = (
        found.record.improvement.without,
        found.record.improvement.with_setting,
    )
    gap = without - natural_error(quantizer)
    print(
        f"without {without:.5f}, shipped {shipped:.5f}, gap closed {(without - shipped) / gap:.3f}"
    )
    assert without - shipped >= 0.8 * gap > 0


@pytest.mark.parametrize(("planting", "quantizer"), CASES, ids=NAMES)
def test_what_ships_removes_the_outliers(
    planting: Planting, quantizer: Quantizer, journal: Path
) -> None:
    """In the float graph, on photographs that curation did not see."""
    found, graph = curated(planting, quantizer, journal), planted_graph(planting)
    view = view_encoder(graph)
    fc2 = view.blocks[planting.block].mlp.fc2.input.name
    cured, _ = place_registers(graph, view, found.setting, found.tokens)
    images = halves(1, 9).numpy()
    before, after = (
        run_graph(run(Observe((fc2,)), one).graph, images)[-1] for one in (graph, cured)
    )
    unit = planted(planting).unit
    assert before[..., unit].max() > PEAK / 2
    assert after[..., unit].max() < PEAK / 20
