"""`regcache doctor`: what is missing, what is broken, and the commands that mend it."""

import json
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run_regcache

from regcache.compiler.inspection import doctor
from regcache.compiler.inspection.doctor import Diagnosis, Finding, examine
from regcache.passes.errors import InputError
from regcache.runtime.gpu import Gpu

EXTRAS = {
    "PyTorch sources": ("export", "torch"),
    "TensorRT": ("trt", "tensorrt"),
    "TensorRT-RTX": ("trt-rtx", "tensorrt_rtx"),
    "linear probe": ("eval", "sklearn"),
    "reports": ("report", "jinja2"),
    "plots": ("report", "matplotlib"),
    "data sets": ("datasets", "pyarrow"),
    "clusters": ("scale", "distributed"),
}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed; a quick run has no PyTorch to be looked for."""
    without(monkeypatch)


def found(name: str) -> Finding:
    (finding,) = (finding for finding in examine().findings if finding.name == name)
    return finding


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let an environment have every module but some."""
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in modules else object())


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_extra_is_told_with_its_price_and_its_command(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    extra, module = EXTRAS[name]
    without(monkeypatch, module)
    finding = found(name)
    assert finding.state == "missing"
    assert finding.costs
    assert finding.fix == f'pip install "regcache[{extra}]"'
    without(monkeypatch)
    assert found(name).state == "ok"
    assert found(name).fix is None


def test_half_an_extra_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "timm", "onnxscript")
    assert "(without timm, onnxscript)" in str(found("PyTorch sources").costs)


def test_extras_are_those_of_the_package() -> None:
    """Each that regcache itself names in a message is looked for."""
    looked_for = {extra.extra for extra in doctor._EXTRAS} | {"openvino", "gpu"}
    known = {"datasets", "export", "openvino", "gpu", "trt", "trt-rtx", "report", "eval", "scale"}
    assert looked_for == known


@pytest.mark.parametrize("installed", ["onnxruntime", "onnxruntime-gpu"])
def test_two_onnx_runtimes_are_a_fault(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(doctor, "installed_versions", lambda _: {installed: "1.0"})
    assert found("ONNX Runtime").state == "ok"
    both = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    monkeypatch.setattr(doctor, "installed_versions", lambda _: both)
    assert found("ONNX Runtime").state == "broken"
    assert "pip uninstall" in str(found("ONNX Runtime").fix)


@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], ["CUDAExecutionProvider"]])
def test_a_gpu_that_onnx_runtime_cannot_use(
    monkeypatch: pytest.MonkeyPatch, providers: list[str]
) -> None:
    gpu = Gpu("RTX 4090", "8.9", "580.1", 24_000_000_000)
    monkeypatch.setattr(doctor, "find_gpu", lambda: gpu)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    finding = found("GPU")
    assert str(finding.found).startswith("RTX 4090, compute capability 8.9")
    usable = "CUDAExecutionProvider" in providers
    assert (finding.fix is None) == usable
    assert (finding.costs is None) == usable


def test_no_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Gpu:
        raise InputError("no GPU: the driver sleeps")

    monkeypatch.setattr(doctor, "find_gpu", none)
    assert found("GPU").state == "missing"
    assert "the driver sleeps" in str(found("GPU").costs)


def test_a_broken_openvino_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> bool:
        raise ImportError("libtbb.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(doctor, "has_openvino", lambda: True)
    monkeypatch.setattr(doctor, "computes_bf16", fails)
    assert found("OpenVINO").fault == "libtbb.so.12: cannot open shared object file"
    monkeypatch.setattr(doctor, "has_openvino", lambda: False)
    assert found("OpenVINO").fix == 'pip install "regcache[openvino]"'


def test_a_full_disk_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(9e9, 8e9, 1e9))
    for name in ("temporary files", "cache"):
        assert found(name).state == "broken"
        assert found(name).fix


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGCACHE_CACHE", str(tmp_path / "file"))
    finding = found("cache")
    assert finding.state == "broken"
    assert "file" in str(finding.fault)


@pytest.mark.parametrize("saturates", [False, True])
def test_a_cpu_whose_kernels_saturate(monkeypatch: pytest.MonkeyPatch, saturates: bool) -> None:
    monkeypatch.setattr(doctor, "u8s8_saturates", lambda: saturates)
    assert ("VNNI" in str(found("CPU").costs)) == saturates


def of(*findings: Finding) -> Any:
    return lambda: Diagnosis(findings=list(findings))


FINE = Finding(name="Python", found="3.11")
LACKING = Finding(name="plots", costs="nothing is drawn", fix='pip install "regcache[report]"')
BROKEN = Finding(name="cache", found="/cache", fault="it is full", fix="rm -r /cache")


@pytest.mark.parametrize(("last", "code"), [(LACKING, 0), (BROKEN, 1)])
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: Finding, code: int
) -> None:
    """Something missing is no failure, something broken is; commands come behind the table."""
    monkeypatch.setattr("regcache.compiler.cli.doctor.examine", of(FINE, LACKING, last))
    done = run_regcache("doctor", "--json", tmp_path / "found.json")
    assert done.code == code
    lines = done.out.splitlines()
    assert last.state in done.out
    first = f"{last.name}: {last.fix}"
    assert first in lines
    assert lines.index(first) == next(i for i, line in enumerate(lines) if ": " in line)
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["findings"][0] == FINE.model_dump()


@pytest.mark.slow
def test_the_real_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", find_spec)
    done = run_regcache("doctor", "--json", "-")
    findings = Diagnosis.model_validate_json(done.out).findings
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    states = {finding.name: finding.state for finding in findings}
    assert states["Python"] == states["ONNX Runtime"] == "ok"
    for finding in findings:
        assert finding.found or finding.costs or finding.fault
