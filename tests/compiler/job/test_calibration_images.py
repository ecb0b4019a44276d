"""Which images a compilation looks at: at most so many, drawn by the seed."""

from pathlib import Path

import pytest

from regcache.compiler.job.calibration_images import calibration_images
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import Precision
from regcache.passes.errors import InputError
from regcache.runtime.list_images import list_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(40):
        (tmp_path / f"{index:02}.png").touch()
    return tmp_path


def options(folder: Path, **more: object) -> CompileOptions:
    return CompileOptions.model_validate({"source": "a.onnx", "images": str(folder), **more})


def test_so_many_are_drawn_by_the_seed(folder: Path) -> None:
    every = list_images(folder)
    assert calibration_images(options(folder)) == every
    assert calibration_images(options(folder, max_images=40)) == every
    some = calibration_images(options(folder, max_images=10))
    assert some == calibration_images(options(folder, max_images=10))
    assert len(set(some)) == 10
    assert some == sorted(some)
    assert set(some) < set(every)
    assert some != every[:10]
    assert some != calibration_images(options(folder, max_images=10, seed=1))


def test_too_few_are_a_warning(folder: Path) -> None:
    told: list[str] = []
    calibration_images(options(folder), told.append)
    assert not told
    for path in list_images(folder)[15:]:
        path.unlink()
    calibration_images(options(folder, precision=Precision.BF16, target="openvino"), told.append)
    assert not told  # nothing is calibrated
    calibration_images(options(folder), told.append)
    assert told == ["15 images to calibrate on are few: give 16 or more"]


def test_none_is_no_limit(folder: Path) -> None:
    with pytest.raises(InputError, match="from 1 is wanted, not 0"):
        options(folder, max_images=0)
