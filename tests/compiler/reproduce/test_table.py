"""The paper's figures beside ours, and how long a run is said to take."""

from dataclasses import replace
from typing import Any

import pytest

from regcache.compiler.reproduce import estimate
from regcache.compiler.reproduce.estimate import Pace, Work, tell_time
from regcache.compiler.reproduce.paper import paper_figures
from regcache.compiler.reproduce.table import Reproduction, Row, Table

SYNSETS = [f"n{number:08}" for number in range(1000)]
CLIP = "hf:openai/clip-vit-base-patch16"


def row(bits: str, quantizer: str, registers: str, top1: float, part: str = "naive") -> Row:
    given = {"bits": bits, "quantizer": quantizer, "registers": registers, "part": part}
    reason = "because" if part == "both" else ""
    metrics = {"zero-shot top-1": top1}
    return Row.model_validate({**given, "reason": reason, "cosine": 1.0, "metrics": metrics})


def table(source: str = CLIP, **more: Any) -> Table:
    rows = [
        row("float", "", "off", 0.68),
        row("w8a8", "min-max", "off", 0.35),
        row("w8a8", "min-max", "R = 1 (kv) in blocks [3, 12)", 0.6, "both"),
        row("w8a8", "output-error", "off", 0.6),
        row("w4a4", "min-max", "off", 0.02),
    ]
    known = {"target": "tensorrt", "evaluated": ["val"], "n_images": 5, "n_available": 5}
    rest = {"limit": None, "train": None, "train_limit": None, "calibration": "train"}
    return Table.model_validate(
        {"source": source, "n_calibration": 128, "rows": rows} | known | rest | more
    )


def test_the_papers_figures_stand_beside_what_they_are_of() -> None:
    found = table().beside_paper(SYNSETS)
    assert [one.paper for one in found.rows] == [None, 0.3401, 0.5971, None, None]
    differences = [one.difference for one in found.rows]
    assert differences[1:3] == [pytest.approx(0.0099), pytest.approx(0.0029)]
    assert differences[::3] == [None, None]
    lines = found.markdown().splitlines()
    head = "| bits | base quantizer | registers | zero-shot top-1 | the paper's | difference |"
    assert any(line.startswith(head) for line in lines)
    assert "| w8a8 | min-max | off | 35.00 | 34.01 | +0.99 | 1.00000 |" in lines
    assert "| float |  | off | 68.00 |  |  | 1.00000 |" in lines


def test_other_sources_and_other_images_have_none() -> None:
    for found in (
        table("hf:openai/clip-vit-base-patch32").beside_paper(SYNSETS),
        table().beside_paper(SYNSETS[:999]),
        table().beside_paper([*SYNSETS[:999], "cats"]),
    ):
        assert all(one.paper is None for one in found.rows)
        assert "the paper's" not in found.markdown()


def test_nearest_neighbours_are_not_held_against_zero_shot() -> None:
    rows = [Row(bits="w8a8", quantizer="min-max", cosine=1.0, metrics={"kNN top-1": 0.5})]
    assert table(rows=rows).beside_paper(SYNSETS).rows[0].paper is None


def test_parts_of_an_ablation_have_figures_of_their_own() -> None:
    parts = ("naive", "both", "registers", "deletion")
    rows = [row("w8a8", "min-max", "R = 0", 0.5, part) for part in parts]
    siglip = table("hf:google/siglip-base-patch16-224", rows=rows).beside_paper(SYNSETS)
    assert [one.paper for one in siglip.rows] == [0.6971, 0.7438, 0.7437, 0.4241]
    assert [one.paper for one in table(rows=rows).beside_paper(SYNSETS).rows] == [
        *(0.3401, 0.5971, None, None),
    ]


@pytest.mark.parametrize(
    ("source", "both"),
    [
        (CLIP, 0.5971),
        ("openclip:ViT-B-16/openai", 0.5971),
        ("hf:google/siglip-base-patch16-224", 0.7438),
        ("hf:google/siglip2-base-patch16-224", 0.7235),
    ],
)
def test_sources_of_the_paper(source: str, both: float) -> None:
    figures = paper_figures(source, SYNSETS)
    assert figures is not None
    assert figures.both == both


def test_several_tables_are_one_record() -> None:
    both = Reproduction(tables=[table(), table("other")])
    text = both.markdown()
    assert text.index(CLIP) < text.index("other, simulated for")
    assert Reproduction.model_validate_json(both.model_dump_json()) == both


def test_what_is_left_takes_its_images_and_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_cpus", lambda: 4)
    work, pace = Work(images=50_000, least=3, most=5, searches=2), Pace(read=0.008, run=0.01)
    least, most = work.seconds(pace)
    assert least == pytest.approx(50_000 * 0.002 + 2 * 200 * 0.01 + 150_000 * 0.01)
    assert most == pytest.approx(50_000 * 0.002 + 2 * 1000 * 0.01 + 250_000 * 0.01)
    bounded = replace(work, budget=1.0).seconds(pace)
    assert bounded == pytest.approx((1602.0, 2602.0))
    assert str(work) == "50,000 images, 3 to 5 encoders, 2 searches"
    assert str(Work(10, 2, 2, 0)) == "10 images, 2 encoders"


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ((7200, 12600), "2.0 to 3.5 hours"),
        ((3000, 3600), "0.8 to 1.0 hours"),
        ((90, 240), "1.5 to 4.0 minutes"),
        ((0.2, 0.2), "0.2 seconds"),
    ],
)
def test_a_span_of_time_in_words(span: tuple[float, float], text: str) -> None:
    assert tell_time(*span) == text
