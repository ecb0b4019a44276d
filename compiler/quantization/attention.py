"""The scales of attention's operands, for targets that multiply them in int8."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.encoder import EncoderView
from regcache.passes.observe import Observe
from regcache.passes.quantize_attention import attention_operands
from regcache.runtime.device import CPU, Device


def attention_scales(
    view: EncoderView,
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int | None = None,
    device: Device = CPU,
) -> dict[str, Affine]:
    """Signed int8 scales of queries, keys and values, by the names of their tensors.

    Each covers the largest magnitude over `batches`, images [B, 3, H, W].
    """
    names = [name for four in attention_operands(view).values() for name in four[:3]]
    peaks = dict.fromkeys(names, 0.0)
    observed = run(Observe(tuple(names)), view.graph).graph
    with open_graph(observed, threads=threads, device=device) as session:
        for images in batches:
            for name, values in zip(session.output_names, session.run(images), strict=True):
                if name in peaks:
                    peaks[name] = max(peaks[name], float(np.abs(values).max()))
    return {
        name: Affine.from_range(-peak, peak, "int8", symmetric=True) for name, peak in peaks.items()
    }
