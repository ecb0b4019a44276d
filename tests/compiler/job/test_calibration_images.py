"""Which images a compilation looks at: at most so many, drawn by the seed."""

from pathlib import Path

import pytest

from regcache.compiler.job.calibration_images import calibration_images
from regcache.compiler.job.options import CompileOptions
from regcache.passes.errors import InputError
from regcache.runtime.list_images import list_images
from regcache.runtime.stored_images import AnyImage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(40):
        (tmp_path / f"{index:02}.png").touch()
    return tmp_path


def drawn(folder: Path, most: int = 512, seed: int = 0) -> list[AnyImage]:
    return calibration_images(str(folder), most, seed)


def test_so_many_are_drawn_by_the_seed(folder: Path) -> None:
    every = list_images(folder)
    assert drawn(folder) == drawn(folder, 40) == every
    some = drawn(folder, 10)
    assert some == drawn(folder, 10)
    assert len(set(some)) == 10
    assert some == [path for path in every if path in some]
    assert set(some) < set(every)
    assert some != every[:10]
    assert some != drawn(folder, 10, seed=1)


def test_too_few_are_a_warning(folder: Path) -> None:
    told: list[str] = []
    calibration_images(str(folder), 512, 0, told.append)
    assert not told
    for path in sorted(folder.iterdir())[15:]:
        path.unlink()
    calibration_images(str(folder), 512, 0, told.append, calibrates=False)
    assert not told
    calibration_images(str(folder), 512, 0, told.append)
    assert told == ["15 images to calibrate on are few: give 16 or more"]


def test_none_is_no_limit() -> None:
    with pytest.raises(InputError, match="from 1 is wanted, not 0"):
        CompileOptions(source="a.onnx", images="photos", max_images=0)
