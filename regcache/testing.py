"""Parity as an assertion, for tests of one's own: `pytest` or any other.

from regcache.testing import assert_parity

def test_the_artifact_is_close() -> None:
    assert_parity("auto", "vit-int8", "photos/", cosine_mean=0.999, cosine_min=0.99)
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from regcache.compiler.artifact.artifact import Artifact
    from regcache.runtime.parity_result import ParityResult

    Encoder = Callable[[NDArray[Any]], Any]

__all__ = ["assert_parity"]


def assert_parity(
    reference: "Literal['auto', 'pytorch', 'float-onnx'] | nn.Module | Encoder",
    artifact: "Artifact | str | os.PathLike[str]",
    images: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    max_regression: float = 0.2,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
    runtime: Literal["onnxruntime", "openvino"] | None = None,
    **thresholds: float,
) -> "ParityResult":
    """Fail, saying what fell short and on which images, where an artifact is not close enough.

    `reference`: what it has to be close to. A torch.nn.Module, run in eval mode and left as it was;
    a function of a batch, as the artifact's preprocessing makes it (float32 [B, 3, height, width]
    for most), that returns the embeddings [B, D], or several arrays with these first; or one of the
    names that `regcache.parity` takes: "auto" is the source, where it can be run, else the
    artifact's float.onnx.
    `artifact`: what `regcache.compile` returned, or its folder. `images`: a folder, a list, a
    pattern.
    `thresholds`: least values by name, `cosine_mean=0.999, nn_agreement=0.9`; 0.995 for
    `cosine_mean` where it is not named. `baseline`, `max_regression`: as in `regcache.parity`.
    `batch_size`, `threads`, `device`, `runtime`: as there.

    Returns what was measured. Raises AssertionError where a threshold is missed, and
    `regcache.InputError` where nothing can be compared.
    """
    __tracebackhide__ = True  # pytest shows the line that calls this
    from regcache._api import run_with_of
    from regcache._parity import measure_parity
    from regcache.compiler.parity.own_original import OwnOriginal
    from regcache.runtime.parity_output import shortfall

    result = measure_parity(
        artifact,
        images,
        thresholds=thresholds,
        reference=reference if isinstance(reference, str) else OwnOriginal.of(reference),
        against="artifact",
        per_layer=False,
        gallery=None,
        query=None,
        class_scores=None,
        batch_size=batch_size,
        threads=threads,
        device=device,
        run_with=run_with_of(runtime, "auto", "latency", None),
        verbose=False,
        baseline=baseline,
        max_regression=max_regression,
    )
    if not result.passed:
        named = artifact if isinstance(artifact, (str, os.PathLike)) else artifact.folder
        raise AssertionError(shortfall(result, os.fspath(named)))
    return result
