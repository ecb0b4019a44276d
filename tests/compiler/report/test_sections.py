"""What a report says of artifacts of every kind: figures of what there is, else sentences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.command_line import run_regcache
from support.html_page import HtmlPage
from support.reported import bench_result, with_engine, with_registers
from support.tiny_artifact import write_tiny

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.job.targets import Precision
from regcache.compiler.report.page import Figure, Part, Section, Sentence, Table
from regcache.compiler.report.placement import placement_section
from regcache.compiler.report.search import search_section
from regcache.compiler.report.sites import (
    damages,
    ranges_section,
    sensitivity_section,
)
from regcache.compiler.report.subject import Subject, read_subject
from regcache.compiler.report.write import page_of, render


def page(subject: Subject) -> HtmlPage:
    found = HtmlPage(render(page_of(subject)))
    found.check()
    return found


def figures(section: Section) -> list[Figure]:
    return [part for part in section.parts if isinstance(part, Figure)]


def words(section: Section) -> str:
    return " ".join(part.text for part in section.parts if isinstance(part, Sentence))


def table_of(parts: Sequence[Part], caption: str) -> Table:
    tables = [part.table if isinstance(part, Figure) else part for part in parts]
    (found,) = (part for part in tables if isinstance(part, Table) and part.caption == caption)
    return found


def test_bars_are_as_high_as_the_damage(subject: Subject) -> None:
    (figure,) = figures(sensitivity_section(subject))
    (plot,) = figure.plots
    found = damages(subject.manifest)
    heights = {rect.says.partition(":")[0]: rect.height for rect in plot.rects}
    most = max(found, key=lambda site: found[site])
    assert heights.keys() == {site for site, damage in found.items() if damage}
    for site, height in heights.items():
        assert height / heights[most] == pytest.approx(found[site] / found[most], abs=0.01)
    rows = table_of([figure], "Damage of every layer, most first").rows
    assert [row[0] for row in rows] == sorted(found, key=lambda site: -found[site])


def test_damage_is_read_off_the_curve_where_nothing_was_searched(subject: Subject) -> None:
    curation = subject.manifest.curation.model_copy(update={"sensitivity": []})
    alone = subject.manifest.model_copy(update={"curation": curation})
    expected = damages(subject.manifest)
    assert damages(alone) == pytest.approx(expected, abs=1e-12)
    assert figures(sensitivity_section(replace(subject, manifest=alone)))


def test_every_range_is_drawn_as_it_was_chosen(subject: Subject) -> None:
    sites = subject.manifest.quantization.sites
    section = ranges_section(subject)
    (figure,) = figures(section)
    drawn = [rect for plot in figure.plots for rect in plot.rects]
    assert len(drawn) == 2 * len(sites)
    cut = sum(
        site.covered[0] - site.observed[0] > site.scale / 2
        or site.observed[1] - site.covered[1] > site.scale / 2
        for site in sites
    )
    assert f"{cut} of {len(sites)} ranges cut off" in words(section)


def test_the_point_that_ships_is_marked_on_the_curve(subject: Subject) -> None:
    (figure,) = figures(placement_section(subject))
    quantization = subject.manifest.quantization
    (shipped,) = (dot for dot in figure.plots[0].dots if dot.large)
    assert f"{quantization.int8_share:.1%}" in shipped.says
    others = [(dot.x, dot.y) for dot in figure.plots[0].dots if not dot.large]
    assert len(others) == len(quantization.pareto)
    # It lies on the curve where nothing was passed over.
    assert min(abs(x - shipped.x) + abs(y - shipped.y) for x, y in others) < 2
    marked = [row[0] for row in figure.table.rows if row[1]]
    assert set(marked) == set(quantization.left_float)


def test_a_search_is_shown_with_its_decision(subject: Subject) -> None:
    section = search_section(with_registers(subject))
    decision, tried = figures(section)
    assert "lies above zero: registers ship" in decision.about
    (gain,) = decision.plots[0].dots
    interval = decision.plots[0].lines[1].points.split()
    low, high = (float(point.partition(",")[0]) for point in interval)
    assert low < gain.x < high
    assert len(tried.plots[0].dots) == 2
    assert [dot.large for dot in tried.plots[0].dots] == [True, False]
    assert [dot.series for dot in tried.plots[0].dots] == ["c", "d"]
    assert tried.table.rows[3][4] == "<no patches>"
    assert [row[2] for row in table_of(section.parts, "Candidates").rows] == ["yes", ""]
    found = page(with_registers(subject))
    assert "&lt;no patches&gt;" in found.text
    assert "and with its registers" in found.words


def test_engines_primitives_and_times_are_shown(subject: Subject) -> None:
    found = page(replace(with_engine(subject), bench=bench_result(), kernels=None))
    assert "What OpenVINO computes in" in found.words
    assert "What model-tensorrt-rtx-8.9-batch-1-1-8.engine computes in" in found.words
    assert "How long a run takes with ort-cuda" in found.words
    assert "RTX 4090" in found.words
    assert "integer products" not in found.words


def test_weights_alone_are_said_to_be_quantized(subject: Subject) -> None:
    manifest = subject.manifest
    nothing: dict[str, object] = {
        "activation_bits": None,
        "weight_bits": 4,
        "sites": [],
        "pareto": [],
    }
    curation = manifest.curation.model_copy(update={"sensitivity": [], "streams": []})
    changed = {
        "options": manifest.options.model_copy(update={"precision": Precision.W4A16}),
        "quantization": manifest.quantization.model_copy(update=nothing),
        "curation": curation,
    }
    changed_manifest = manifest.model_copy(update=changed)
    found = page(replace(subject, manifest=changed_manifest, kernels={"MatMulNBits": 5}))
    for text in (
        "All activations stay float",
        "Activations stay float: there are no ranges",
        "Two weights of 4 bits share a byte",
        "products with 4-bit weights",
        "While compiling, nothing was measured of it.",
    ):
        assert text in found.words


def test_what_is_not_quantized_is_said(tmp_path: Path) -> None:
    encoder, artifact = write_tiny(tmp_path), tmp_path / "artifact"
    options = ("--precision", "fp16", "--target", "tensorrt-rtx", "--threads", 1)
    outcome = run_regcache("compile", encoder, "-o", artifact, *options)
    assert outcome.code == 0, outcome
    subject = read_subject(Artifact.open(artifact), threads=1)
    found = page(subject)
    for text in (
        "Nothing is quantized in fp16",
        "Nothing is quantized: there are no ranges",
        "Everything is float: it computes in fp16",
        "is known once an engine is built",
        "pictures drawn at random",
    ):
        assert text in found.words
    for section in (sensitivity_section, ranges_section, placement_section):
        assert not figures(section(subject))


def test_the_same_artifact_gives_the_same_page(subject: Subject) -> None:
    assert render(page_of(subject)) == render(page_of(subject))
