"""What a machine is called."""

import platform
from pathlib import Path

import pytest

from regcache.runtime.machine import cpu_features, cpu_name, describe_machine
from regcache.runtime.session import available_cpus


def test_the_cpu_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz \nmodel name\t: another\n")
    assert cpu_name(file) == "Some CPU @ 2 GHz"
    assert cpu_name(tmp_path / "none") in (platform.processor(), platform.machine())


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = describe_machine()
    assert machine.cpus == available_cpus()
    assert machine.cpu
    assert machine.gpu is None
    assert {"regcache", "numpy"} <= machine.versions.keys()
    assert {"onnxruntime", "onnxruntime-gpu"} & machine.versions.keys()


def test_features_that_decide(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni avx512_vnni_x\n")
    assert cpu_features(info) == ("avx2", "avx512f", "avx512_vnni")
    assert cpu_features(tmp_path / "none") == ()
