"""Energy counters, from a folder like Linux's and from the real NVML."""

import os
from pathlib import Path

import pytest

from regcache.passes.errors import InputError
from regcache.runtime.energy import NvmlMeter, RaplMeter, Unreadable, cpu_meter, gpu_meter


def zone(folder: Path, name: str, kind: str, microjoules: int, limit: int = 1000) -> Path:
    path = folder / name
    path.mkdir()
    (path / "name").write_text(f"{kind}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_packages_are_added_and_followed_round_the_end(tmp_path: Path) -> None:
    one = zone(tmp_path, "intel-rapl:0", "package-0", 900)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    # Parts of a package, and the platform, would count its energy twice.
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    meter = cpu_meter(tmp_path)
    assert isinstance(meter, RaplMeter)
    assert meter.source == "RAPL, 2 CPU packages"
    assert meter.read() == 0
    (one / "energy_uj").write_text("950")
    (other / "energy_uj").write_text("10")
    assert meter.read() == pytest.approx(60e-6)
    (one / "energy_uj").write_text("30")  # 50 to the end, and 30 more
    assert meter.read() == pytest.approx(140e-6)
    (one / "energy_uj").unlink()
    with pytest.raises(InputError, match="energy_uj: No such file"):
        meter.read()


def test_no_counters_are_said(tmp_path: Path) -> None:
    meter = cpu_meter(tmp_path / "none")
    assert isinstance(meter, Unreadable)
    assert meter.reason == f"no RAPL counters of a CPU package under {tmp_path / 'none'}"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: path.write_text("much"), "invalid literal"),
        (lambda path: path.unlink(), "No such file or directory"),
    ],
)
def test_counters_that_cannot_be_read_are_said(tmp_path: Path, break_it, reason) -> None:  # type: ignore[no-untyped-def]
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj"
    break_it(path)
    meter = cpu_meter(tmp_path)
    assert isinstance(meter, Unreadable)
    assert meter.reason.startswith(f"{path}: {reason}")


def test_counters_of_root_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj"
    path.chmod(0)
    if os.geteuid() == 0:  # root reads all the same
        real = Path.read_text

        def refuse(self: Path) -> str:
            if self == path:
                raise PermissionError(13, "Permission denied", str(path))
            return real(self)

        monkeypatch.setattr(Path, "read_text", refuse)
    meter = cpu_meter(tmp_path)
    assert isinstance(meter, Unreadable)
    assert meter.reason == f"{path}: not readable by this user"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    meter = gpu_meter()
    assert isinstance(meter, Unreadable)
    assert meter.reason.startswith("no GPU: ")
    with pytest.raises(InputError, match="no GPU: "):
        NvmlMeter().read()
