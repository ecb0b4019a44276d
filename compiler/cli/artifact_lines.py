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
    slower = _slower(manifest)
    if slower is not None:
        lines.insert(2, slower)
    if manifest.primitives is not None:
        lines.insert(2, describe_primitives(manifest.primitives))
    print_lines(lines)


def _slower(manifest: Manifest) -> str | None:
    """Where a quantized model for TensorRT is predicted to be slower than FP16, and what is not."""
    times = [time for time in manifest.quantization.predicted if (time.ratio or 0.0) > 1]
    if not times:
        return None
    worst = max(times, key=lambda time: time.ratio or 0.0)
    names = ", ".join(dict.fromkeys(time.gpu for time in times))
    return (
        f"predicted slower than FP16 on {names} ({worst.ratio:.2f} x on {worst.gpu} at batch "
        f"{worst.batch}): compile with --prefer fastest, and --gpu for one GPU, or --precision fp16"
    )
