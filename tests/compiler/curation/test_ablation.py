"""`--ablate`: registers alone, deletion alone and both, beside none."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.command_line import assert_refused, run_regcache
from support.sinking import BLOCK, SPEC, write_sinking
from support.tiny_source import photos

from regcache.compiler.curation.record import AblationRecord, CurationRecord

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("executor")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    photos(folder / "photos", 20, seed=1)
    write_sinking(folder / "sinking.onnx")
    return folder


@pytest.fixture(scope="module")
def asked(folder: Path) -> tuple[CurationRecord, str]:
    """What `registers --ablate` found, and what it printed."""
    command = ("registers", folder / "sinking.onnx", "--images", folder / "photos")
    outcome = run_regcache(
        *command, "-o", folder / "out.onnx", "--ablate", "--json", folder / "found.json"
    )
    assert outcome.code == 0, outcome
    found = json.loads((folder / "found.json").read_text())["curation"]
    return CurationRecord.model_validate_json(json.dumps(found)), outcome.out


def rows(record: CurationRecord) -> dict[str, AblationRecord]:
    return {row.part: row for row in record.ablation}


def test_parts_are_measured_as_the_decision_was(asked: tuple[CurationRecord, str]) -> None:
    record, found = asked[0], rows(asked[0])
    assert list(found) == ["naive", "registers", "deletion", "both"]
    naive, registers, deletion, both = found.values()
    assert not naive.setting.changes
    assert (registers.setting.count > 0, registers.setting.delete_count) == (True, 0)
    assert (deletion.setting.count, deletion.setting.delete_count > 0) == (0, True)
    assert both.setting.candidates == registers.setting.candidates
    assert both.setting.delete_count == deletion.setting.delete_count
    shipped, seen = record.improvement, both.improvement
    assert shipped is not None
    assert both.setting == record.setting
    assert seen == shipped
    assert (naive.error, both.error) == (shipped.without, shipped.with_setting)
    assert both.error is not None
    assert all(row.error is not None and row.error >= both.error for row in found.values())
    assert naive.improvement is None


def test_norms_are_those_of_tokens_that_are_left(
    asked: tuple[CurationRecord, str], folder: Path
) -> None:
    """The one massive position, and what is left without it."""
    found = rows(asked[0])
    norms = {name: row.largest_norm for name, row in found.items()}
    position = next(
        onnx.numpy_helper.to_array(item)
        for item in onnx.load(folder / "sinking.onnx").graph.initializer
        if item.name == "position"
    )
    largest = float(np.abs(position).max())
    assert norms["naive"] == pytest.approx(largest, rel=0.2)
    assert norms["registers"] == pytest.approx(largest, rel=0.2)
    for part in ("deletion", "both"):
        norm = norms[part]
        assert norm is not None
        assert norm < 0.5 * largest
    assert asked[0].streams[BLOCK + 1].maximum == pytest.approx(norms["naive"], rel=0.2)


def test_the_table_is_printed(asked: tuple[CurationRecord, str]) -> None:
    printed = asked[1]
    assert "images that the search never saw; norms behind block 1" in printed
    for part in ("naive", "registers", "deletion", "both"):
        assert f" {part} " in printed


def test_a_manifest_and_its_report_hold_it(folder: Path) -> None:
    """And what ships, which is registers here, is in the graph and in the file beside it."""
    fast = ("--rounding", "nearest", "--no-equalize", "--int8-share", "1", "--accept-slower")
    command = ("compile", folder / "sinking.onnx", "--images", folder / "photos")
    artifact, page = folder / "artifact", folder / "report.html"
    outcome = run_regcache(
        *command, "-o", artifact, "--ablate", *fast, "--calibrator", "min-max", "--threads", "1"
    )
    assert outcome.code == 0, outcome
    assert "norms behind block 1" in outcome.out
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert len(manifest["curation"]["ablation"]) == 4
    setting = manifest["curation"]["setting"]
    assert setting["candidates"]
    names = [node.name for node in onnx.load(artifact / "model.onnx").graph.node]
    registers = [name for name in names if name.startswith("regcache.registers/")]
    assert any("/kv/" in name or "/token/" in name for name in registers)
    assert bool(setting["delete_count"]) == any("/delete/" in name for name in registers)
    tokens = np.load(artifact / "registers.npz")["tokens"]
    assert tokens.shape == (len(setting["candidates"]), SPEC.width)
    assert run_regcache("report", artifact, "-o", page).code == 0
    text = page.read_text()
    assert "Registers and deletion, apart and together" in text
    assert "largest token norm behind block 1" in text


def test_it_needs_a_search(folder: Path) -> None:
    command = ("compile", folder / "sinking.onnx", "--images", folder / "photos")
    refused = run_regcache(*command, "-o", folder / "x", "--ablate", "--registers", "off")
    assert_refused(refused, "--ablate says nothing with --registers off: there is no search")
