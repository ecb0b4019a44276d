"""Energy counters: RAPL of a CPU (Linux powercap) and NVML of a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.gpu import open_device

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """A counter of energy. `source`: what it counts, for people."""

    source: str

    def read(self) -> float:
        """Joules used since some fixed moment. Raises InputError when it cannot be read."""


@dataclass(frozen=True)
class Unreadable:
    """Why there is no meter."""

    reason: str


def cpu_meter(folder: Path = POWERCAP) -> EnergyMeter | Unreadable:
    """RAPL's counters of all CPU packages, where this process may read them."""
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _is_package(zone)]
    if not zones:
        return Unreadable(f"no RAPL counters of a CPU package under {folder}")
    try:
        return RaplMeter(zones)
    except InputError as error:
        return Unreadable(str(error))


def gpu_meter() -> EnergyMeter | Unreadable:
    """NVML's counter of the whole board, where the GPU has one (Volta and later)."""
    meter = NvmlMeter()
    try:
        meter.read()
    except (InputError, MissingExtraError) as error:
        return Unreadable(str(error))
    return meter


class RaplMeter:
    """The sum of some RAPL zones, each a folder with `energy_uj` and `max_energy_range_uj`.

    A counter that wraps around is followed, as long as it is read once a round (minutes).
    Raises InputError when a file cannot be read; since 2020, kernels let only root do so.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        self.source = f"RAPL, {len(zones)} CPU package{'s' if len(zones) > 1 else ''}"
        self._ranges = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._microjoules = 0

    def read(self) -> float:
        """Joules since the meter was made."""
        for zone, before in self._last.items():
            now = self._last[zone] = _number(zone / "energy_uj")
            self._microjoules += now - before + (self._ranges[zone] if now < before else 0)
        return self._microjoules / 1e6


class NvmlMeter:
    """The energy of the GPU's board since its driver was loaded."""

    source = "NVML, the whole GPU board"

    def read(self) -> float:
        """Joules. Raises InputError where the GPU counts none."""
        with open_device() as (nvml, device):
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1e3


def _is_package(zone: Path) -> bool:
    """Not a part of a package (core, dram), nor the platform, which counts packages again."""
    try:
        return (zone / "name").read_text().startswith("package-")
    except OSError:
        return False


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise InputError(f"{path}: not readable by this user") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
