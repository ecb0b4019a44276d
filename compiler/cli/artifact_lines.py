"""What `regcache compile` says of the artifact that it wrote."""

import shlex
from pathlib import Path

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.speed_check import describe_primitives, describe_speed
from regcache.compiler.cli.ablation_tables import ablation_tables
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.encoder.prepare import FLOAT
from regcache.passes.model_files import data_file

_SHOWN = {
    "calibration": "of the calibration images",
    "held-out": "of the images held out",
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
    ]
    bound = manifest.quantization.bound
    if bound is not None:
        lines.append(
            f"it keeps to --min-cosine {bound.min_cosine}: {bound.cosine:.6f} on {bound.images} "
            f"images held out, {manifest.quantization.int8_share:.1%} quantized"
        )
    if manifest.primitives is not None:
        lines.append(describe_primitives(manifest.primitives))
    lines += _slower(manifest)
    if manifest.speed is not None:
        lines.append(f"it takes {describe_speed(manifest.speed.ratios)}")
    lines += [
        f"its cosine to float is {result.cosine_mean:.5f} in the mean, {result.cosine_min:.5f} at "
        f"worst, on {result.n_images} {_SHOWN[manifest.parity.images]}",
        f"prove it on others: regcache parity {shlex.quote(str(output))} --images IMAGES",
    ]
    print_lines(lines)
    print_tables(ablation_tables(manifest.curation))


def _slower(manifest: Manifest) -> list[str]:
    """Where a quantized model for TensorRT is predicted to be slower than FP16, and what is not."""
    times = [time for time in manifest.quantization.predicted if (time.ratio or 0.0) > 1]
    if not times:
        return []
    worst = max(times, key=lambda time: time.ratio or 0.0)
    names = ", ".join(dict.fromkeys(time.gpu for time in times))
    return [
        f"it is predicted to be slower than FP16 on {names}: {worst.ratio:.2f} x at worst",
        "try --prefer fastest, with --gpu for one GPU, or --precision fp16",
    ]
