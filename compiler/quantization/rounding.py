"""Round weights and correct biases by the layers' inputs."""

from collections.abc import Mapping, Sequence

import numpy as np

from regcache.compiler.calibration.number_format import Rounded
from regcache.compiler.calibration.number_formats import number_format
from regcache.compiler.calibration.placing import algebra_on
from regcache.compiler.calibration.side_by_side import side_by_side
from regcache.compiler.job.targets import Target
from regcache.compiler.quantization.layer_input import LayerInput
from regcache.compiler.reporter import Reporter
from regcache.passes.encoder import Site
from regcache.passes.external_weights import let_go
from regcache.runtime.device import CPU, Device


def round_weights(
    sites: Sequence[Site],
    inputs: Mapping[str, LayerInput],
    *,
    target: Target,
    threads: int | None = None,
    device: Device = CPU,
    reporter: Reporter | None = None,
) -> Rounded:
    """GPTQ rounding and bias correction of the linears of the sites that `inputs` names.

    `inputs`: what the linears read, by the site's name. Weights of E4M3 are rounded to the nearest,
    and only their biases corrected. `threads` sites are rounded at a time, each by one thread, so
    that nothing depends on their number. `device`: what rounds.
    """
    algebra = algebra_on(device)
    form = number_format(target, algebra)
    wanted = [site for site in sites if site.name in inputs]

    def round_site(site: Site) -> Rounded:
        read = inputs[site.name].moments(algebra, with_gram=form.by_gram, with_lost=form.by_lost)
        weights = form.round(site.linears, read)
        biases = {}
        for linear in site.linears:
            lost = read.float_total @ linear.weight
            lost -= read.total @ weights[linear.name].dequantized()
            biases[linear.name] = np.asarray(lost / read.rows, np.float32)
            let_go(linear.weight)
        return Rounded(weights, biases)

    rounded, found = Rounded(), side_by_side(round_site, wanted, threads)
    if reporter is not None:
        found = reporter.progress(found, len(wanted), "rounding")
    for one in found:
        rounded.weights.update(one.weights)
        rounded.biases.update(one.biases)
    return rounded
