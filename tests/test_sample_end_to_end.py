"""The main job on the real DINOv2-S: accuracy, memory, and a third-party file of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from demo_photos import main as write_photos
from support.command_line import run_regcache
from support.sample import sample_file

from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.export.sample import fetch_sample_onnx
from regcache.passes.canonicalize import canonicalize
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import load_model
from regcache.runtime.original import relative_error
from regcache.runtime.session import OrtSession

pytestmark = [
    pytest.mark.sample,
    pytest.mark.xdist_group("sample"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc"),
]

SIDE = 126  # of the planted encoder, too: exported once
PURPOSES = ("calibration", "evaluation")
# Prints the peak memory of the process in kB once the command is done. Not ru_maxrss: a child
# inherits that of the process it was forked from.
MEASURED = """
import atexit, pathlib
from regcache.compiler.cli.main import main
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print("peak", status.read_text().split("VmHWM:")[1].split()[0]))
main()
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `calibration` and `evaluation`, 16 crops each, as many as a search needs."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    for purpose in PURPOSES:
        paths = sorted((folder / purpose).iterdir())
        for path in set(paths) - set(paths[::5][:16]):
            path.unlink()
    return folder


def every_fourth(photos: Path, folder: Path) -> Path:
    """Where no search needs more."""
    folder.mkdir()
    for path in sorted(photos.iterdir())[::4]:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def exported(folder: Path) -> Path:
    return sample_file(folder)


def in_a_process(*arguments: object) -> str:
    """Run `regcache ARGS` in a process whose memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parity(artifact: Path, images: Path, *more: str) -> dict[str, float]:
    report = artifact.with_suffix(".json")
    done = run_regcache("parity", artifact, "--images", images, "--json", report, *more)
    assert done.code == 0, done.err
    found: dict[str, float] = json.loads(report.read_text())
    return found


def test_the_sample_compiles_close_to_pytorch(photos: Path, tmp_path: Path) -> None:
    """In the memory that it may take, too: 140 MB less than at 224 pixels."""
    artifact = tmp_path / "artifact"
    images = ("--images", photos / "calibration", "--resolution", SIDE)
    command = ("compile", "sample:dinov2-small", *images)
    peak = float(in_a_process(*command, "-o", artifact).split("peak")[1]) / 1e3
    assert 100 < peak <= 3 * (artifact / "float.onnx").stat().st_size / 1e6 + 860
    found = parity(artifact, photos / "evaluation", "--reference", "pytorch")
    assert found["cosine_mean"] >= 0.995
    assert found["cosine_min"] >= 0.95
    assert found["nn_agreement"] >= 0.70
    assert found["patch_cosine_mean"] >= 0.99
    model = onnx.load(artifact / "model.onnx")
    integer = [w for w in model.graph.initializer if w.name.endswith("/quantized")]
    record = json.loads((artifact / "manifest.json").read_text())["quantization"]
    left_float = sum(site.count("+") + 1 for site in record["left_float"])
    assert record["int8_share"] >= 0.95
    assert len(integer) + left_float == 72 + 1  # the patches' one
    sizes = [(artifact / name).stat().st_size for name in ("model.onnx", "float.onnx")]
    assert sizes[0] < 0.35 * sizes[1]


def test_a_third_party_export_compiles(photos: Path, tmp_path: Path) -> None:
    """TorchScript, opset 14, decomposed layer norm and GELU, a segmentation head."""
    artifact = tmp_path / "artifact"
    source = fetch_sample_onnx()
    calibration, evaluation = (
        every_fourth(photos / purpose, tmp_path / purpose) for purpose in PURPOSES
    )
    # Nothing to measure the sensitivity for; GPTQ has the sample's own compilation above.
    more = ("--registers", "off", "--int8-share", "1", "--rounding", "nearest")
    done = run_regcache("compile", source, "--images", calibration, "-o", artifact, *more)
    assert done.code == 0, done.err
    found = parity(artifact, evaluation)
    assert found["cosine_mean"] >= 0.995
    assert found["patch_cosine_mean"] is None


def test_the_third_party_file_is_the_same_encoder(exported: Path) -> None:
    """Its blocks, found by pattern, hold the very weights of our own export."""
    theirs = view_encoder(canonicalize(load_model(fetch_sample_onnx())))
    ours = view_encoder(canonicalize(load_model(exported)))
    assert (theirs.tokens, theirs.prefix_tokens) == (257, 1)
    for one, other in zip(theirs.linears, ours.linears, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.weight, other.weight)


def test_an_exported_file_computes_what_the_export_does(exported: Path, tmp_path: Path) -> None:
    """Compiled by its path instead of by the sample's name."""
    again = tmp_path / "float.onnx"
    recipe = export_source(str(exported), again, None, Reporter())
    assert recipe is not None
    assert recipe.to_json() == sidecar(exported).read_text()
    images = np.random.default_rng(0).standard_normal((3, 3, 224, 224), np.float32)
    with OrtSession(exported) as session:
        names, wanted = session.output_names, session.run(images)
    with OrtSession(again) as session:
        assert session.output_names == names
        assert session.fixed_batch is None
        for batch in (1, 3):
            for found, one in zip(session.run(images[:batch]), wanted, strict=True):
                assert relative_error(found, one[:batch]) < 1e-5
