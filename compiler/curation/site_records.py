"""What a search saw of an encoder's activations, as records."""

from collections.abc import Collection, Mapping

from regcache.compiler.calibration.statistics import TokenNorms, token_kind
from regcache.compiler.curation.record import SensitivityRecord, StreamNorms
from regcache.compiler.curation.workbench import Workbench


def sensitivity_records(
    workbench: Workbench, damage: Mapping[str, float], alone: Collection[str]
) -> list[SensitivityRecord]:
    """What it costs to quantize each site, and what holds its largest value.

    `damage`: by the site's name; `alone`: names of those that were quantized alone to measure it.
    """
    records = []
    for site in workbench.view.sites:
        norms = workbench.site_norms[site.name]
        median, largest = norms.linf.percentile(50), norms.outliers[0]
        records.append(
            SensitivityRecord(
                site=site.name,
                tensor=site.tensor.name,
                block=site.block,
                damage=damage[site.name],
                alone=site.name in alone,
                outlier_ratio=norms.linf.maximum / median if median else 0.0,
                holder=token_kind(largest.token, workbench.view.prefix_tokens),
                token=largest.token,
                channel=largest.channel,
                value=largest.value,
            )
        )
    return records


def norms_record(norms: TokenNorms) -> StreamNorms:
    """How large tokens of one stream are."""
    linf = norms.linf
    return StreamNorms(median=linf.percentile(50), p99=linf.percentile(99), maximum=linf.maximum)
