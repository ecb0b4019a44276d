"""docs/manifest.schema.json is written from the records, and manifests are what it says."""

import copy
import importlib
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import write_schema
from pydantic import BaseModel
from support.json_schema import faults, fields
from support.tiny_artifact import tiny_artifact

import regcache.compiler
import regcache.runtime
from regcache.compiler.artifact.engine_record import EngineKind, EngineRecord
from regcache.compiler.artifact.read_manifest import read_manifest
from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.record import (
    CandidateRecord,
    CurationRecord,
    SensitivityRecord,
    StreamNorms,
    TriedRecord,
    UniversalityRecord,
)
from regcache.compiler.curation.setting import Setting
from regcache.compiler.job.record import Record
from regcache.passes.preprocess import Preprocess
from regcache.runtime.finite_record import FiniteRecord, WrittenRecord

SCHEMA: dict[str, Any] = json.loads(write_schema.FILE.read_text(encoding="utf-8"))
PAGE = (write_schema.FILE.parent / "manifest.md").read_text(encoding="utf-8")
SETTING = Setting(candidates=(0, 0), start=3, end=12, mode="token", delete_at=4, delete_count=2)
RECIPE = Preprocess(28, 28, "squash", (28, 28), "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("schema"), "--int8-share", "0.8", depth=2)


@pytest.fixture(scope="module")
def records() -> set[type[BaseModel]]:
    for package in (regcache.compiler, regcache.runtime):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return {one for one in _below(BaseModel) if one.__module__.startswith("regcache.")}


class TestFile:
    def test_it_is_written_from_the_records(self) -> None:
        text = write_schema.FILE.read_text(encoding="utf-8")
        assert text == write_schema.schema_text(), "run: python docs/write_schema.py"

    def test_every_field_at_any_depth_is_described(self) -> None:
        described = dict(fields(SCHEMA))
        assert len(described) > 150
        assert not [name for name, field in described.items() if not field.get("description")]
        assert {"$.sha256", "SiteRecord.scale", "Preprocess.rgb_last"} <= described.keys()

    def test_what_no_manifest_holds_is_not_in_it(self) -> None:
        names = {name for name, _ in fields(SCHEMA)}
        assert "SpeedRecord.integer_matmuls" in names
        assert not {"SpeedRecord.ratios", "CompileOptions.source_file"} & names


class TestRecords:
    """Of the manifest and of every answer to --json."""

    def test_they_are_of_one_of_two_bases(self, records: set[type[BaseModel]]) -> None:
        assert {one for one in records if WrittenRecord in one.__bases__} == {Record, FiniteRecord}

    def test_every_field_is_described(self, records: set[type[BaseModel]]) -> None:
        names = [
            (record.__name__, name)
            for record in records
            for name, field in record.model_fields.items()
            if not field.description
        ]
        assert not names
        assert len(records) > 40

    def test_no_two_have_one_name(self, records: set[type[BaseModel]]) -> None:
        assert len({record.__name__ for record in records}) == len(records)


@pytest.mark.slow
class TestManifests:
    def test_a_real_one_is_what_the_schema_says(self, artifact: Path) -> None:
        manifest = json.loads((artifact / "manifest.json").read_text())
        assert manifest["speed"] is not None
        assert manifest["quantization"]["sites"]
        assert manifest["quantization"]["pareto"]
        assert faults(manifest, SCHEMA) == []

    def test_one_with_everything_is_what_the_schema_says(
        self, artifact: Path, tmp_path: Path
    ) -> None:
        manifest = read_manifest(artifact)
        changes = {
            "curation": _curated(),
            "engines": [_engine()],
            "options": manifest.options.model_copy(update={"preprocess": RECIPE, "half": False}),
        }
        manifest.model_copy(update=changes).write(tmp_path)
        assert faults(json.loads((tmp_path / "manifest.json").read_text()), SCHEMA) == []

    def test_any_other_is_not(self, artifact: Path) -> None:
        manifest = json.loads((artifact / "manifest.json").read_text())
        for path, value, fault in (
            (("encoder", "width"), "32", "$.encoder.width: '32' is no integer"),
            (("format_version",), 3, "$.format_version: 3 is none of [4, 5]"),
            (("parity", "images"), "others", "$.parity.images: 'others' is none of"),
            (("options", "bits"), 8, "$.options: bits is not known"),
            (("quantization", "sites", 0, "covered"), [0.0], "$.quantization.sites.0.covered"),
            (("encoder", "tokens"), True, "$.encoder.tokens: True is no"),
        ):
            changed = copy.deepcopy(manifest)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (found,) = faults(changed, SCHEMA)
            assert found.startswith(fault)
        for name in ("sha256", "files", "curation"):
            left = {key: value for key, value in manifest.items() if key != name}
            assert faults(left, SCHEMA) == [f"$: {name} is missing"]


@pytest.mark.slow
class TestPage:
    """docs/manifest.md: its examples run."""

    @pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
    @pytest.mark.parametrize("command", re.findall(r"^(jq .*)$", PAGE, re.M))
    def test_a_command_reads_the_manifest(self, command: str, artifact: Path) -> None:
        words = shlex.split(command.replace("ARTIFACT", str(artifact)))
        run = subprocess.run(words, check=True, capture_output=True, text=True)
        assert run.stdout.strip()

    def test_the_example_runs(self, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
        section = PAGE.partition("## From Python")[2]
        (example,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
        exec(example.replace("ARTIFACT", str(artifact)), {})
        first, second = capsys.readouterr().out.splitlines()
        assert first.split()[:2] == [str(artifact.parent / "tiny.onnx"), "ort-cpu"]
        assert re.match(r"blocks\.\d\.\S+ takes steps of [\d.e-]+, for values in \(", second)


def _below(base: type[BaseModel]) -> set[type[BaseModel]]:
    """All classes that are made of `base`, at any depth."""
    return {one for child in base.__subclasses__() for one in {child} | _below(child)}


def _curated() -> CurationRecord:
    sensitivity = SensitivityRecord(
        site="blocks.0.fc1", tensor="x", block=0, damage=0.1, outlier_ratio=9.0, holder="patch",
        token=3, channel=1, value=-7.5,
    )  # fmt: skip
    return CurationRecord(
        reason="R = 2 (token) in blocks [3, 12)",
        setting=SETTING,
        n_images={"fit": 4, "rank": 4, "decide": 8},
        sensitive_block=0,
        sensitivity=[sensitivity],
        block_damage=[0.2],
        streams=[StreamNorms(median=1.0, p99=2.0, maximum=9.0)],
        universality=UniversalityRecord(block=0, outliers=2, largest=0.9, ordinary=0.3),
        candidates=[CandidateRecord(block=-1, norm=9.0, members=1, image=0, token=3)],
        screened=7,
        error_without=0.02,
        tried=[TriedRecord(setting=SETTING, error=None, refused="no patches")],
        improvement=Improvement(
            n_images=8, without=0.02, with_setting=0.01, gain=0.01, gain_low=0.0, gain_high=0.02
        ),
    )


def _engine() -> EngineRecord:
    return EngineRecord(
        file="engines/a.engine",
        model="model.onnx",
        engine=EngineKind.TENSORRT_RTX,
        version="1.7",
        compute_capabilities=["8.6"],
        gpu=None,
        batch=(1, 4, 8),
        products={"INT8": 4},
        layers={"FP16": 9},
        fused_attentions=0,
        warnings=[],
        inputs="0" * 64,
    )
