"""What stands behind `regcache.parity` and `regcache.testing`: input checked, little said."""

from collections.abc import Mapping

from regcache._api import choice_of, count_of, folder_of, path_of, reporter_of
from regcache.compiler.parity.measure import measure_artifact
from regcache.compiler.parity.own_original import OwnOriginal
from regcache.compiler.parity.reference import Against, ReferenceChoice
from regcache.passes.errors import InputError
from regcache.passes.quiet import quiet
from regcache.runtime.baseline import DEFAULT_MAX_REGRESSION, Baseline
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.run_with import RunWith
from regcache.runtime.thresholds import Thresholds


def measure_parity(
    artifact: object,
    images: object,
    *,
    thresholds: object,
    reference: str | OwnOriginal,
    against: str,
    per_layer: bool,
    gallery: object,
    query: object,
    class_scores: bool | None,
    batch_size: int,
    threads: int | None,
    device: str,
    run_with: RunWith,
    verbose: bool,
    baseline: object = None,
    max_regression: float = DEFAULT_MAX_REGRESSION,
) -> ParityResult:
    """`regcache.parity`: see there."""
    if (gallery is None) != (query is None):
        raise InputError("gallery and query go together")
    labelled = None
    if gallery is not None:
        labelled = path_of(gallery, "gallery"), path_of(query, "query")
    with quiet():
        return measure_artifact(
            folder_of(artifact),
            path_of(images, "images"),
            reporter_of(verbose),
            thresholds=_limits(thresholds),
            choice=reference
            if isinstance(reference, OwnOriginal)
            else choice_of(ReferenceChoice, reference, "reference"),
            against=choice_of(Against, against, "against"),
            per_layer=per_layer,
            labelled=labelled,
            class_scores=class_scores,
            batch_size=count_of(batch_size, "batch_size"),
            threads=None if threads is None else count_of(threads, "threads"),
            device=device,
            run_with=run_with,
            baseline=None
            if baseline is None
            else Baseline.read(path_of(baseline, "baseline"), max_regression),
        )


def _limits(given: object) -> Thresholds:
    if isinstance(given, Thresholds):
        return given
    if given is None or isinstance(given, Mapping):
        return Thresholds.of(given or {})
    return Thresholds.read(path_of(given, "thresholds"))
