"""A float encoder in FP16: what `--precision fp16` compiles, and what others are compared with."""

from pathlib import Path

from regcache.compiler.job.targets import TargetProfile
from regcache.passes.base import Pass, run_all
from regcache.passes.canonicalize import canonicalize
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import load_model, save_graph


def half_steps(profile: TargetProfile) -> tuple[Pass, ...]:
    """The passes that bring a float encoder into FP16, as a target takes it."""
    return (FoldBiases(), HalfPrecision()) if profile.merged else (HalfPrecision(),)


def write_half(model: Path, profile: TargetProfile, output: Path) -> None:
    """Write a float ONNX file in FP16, as `--precision fp16` compiles it for the target."""
    graph, _ = run_all(half_steps(profile), canonicalize(load_model(model)))
    save_graph(graph, output)
