"""What `regcache compile` says of the artifact that it wrote."""

from pathlib import Path

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.speed_check import describe_primitives, describe_speed
from regcache.compiler.cli.tables import print_lines
from regcache.compiler.encoder.prepare import FLOAT
from regcache.passes.model_files import data_file

_SHOWN = {
    "calibration": "of the calibration images",
    "given": "of the images",
    "drawn": "pictures drawn at random",
}


def print_artifact(manifest: Manifest, output: Path) -> None:
    """Why no registers ship or which do, sizes, speed, and the first look at parity."""

    def megabytes(model: str) -> str:
        names = (model, data_file(Path(model)).name)
        sizes = [manifest.files[name].size for name in names if name in manifest.files]
        return f"{sum(sizes) / 1e6:.1f} MB"

    result = manifest.parity.result
    lines = [
        manifest.curation.reason,
        f"wrote {output}: model.onnx {megabytes(MODEL)}"
        + (f", float {megabytes(FLOAT)}" if FLOAT in manifest.files else ""),
        f"on {result.n_images} {_SHOWN[manifest.parity.images]}: cosine {result.cosine_mean:.5f}, "
        f"worst {result.cosine_min:.5f}; prove it on others with: regcache parity {output}",
    ]
    if manifest.speed is not None:
        lines.insert(2, describe_speed(manifest.speed.ratios))
    if manifest.primitives is not None:
        lines.insert(2, describe_primitives(manifest.primitives))
    print_lines(lines)
