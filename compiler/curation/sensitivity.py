"""Quantize one block, and one layer, at a time, and measure the damage at the outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regcache.compiler.curation.parts import Part, State, output_errors
from regcache.compiler.curation.workbench import HeldStudy, Workbench


@dataclass(frozen=True)
class BlockDamage:
    """Damage of one block's quantization: mean 1 - cosine of the counted outputs to float.

    `whole`: of all the block's linears together; the rest of the encoder is in float. `sites`: the
    part of it that falls to each activation and the linears that read it, by the site's name.
    """

    sites: dict[str, float]
    whole: float


def block_damage(held: HeldStudy, block: int) -> BlockDamage:
    """The damage of one block, shared out among its sites, by a quarter of the images for it.

    The blocks behind run once, behind the whole block quantized. A site's part of the damage is in
    proportion to the squared error that it alone leaves in the hidden state after the block: the
    blocks behind do much the same to the error of each.
    """
    run_block = _BlockRun(held.workbench(), block, few=True)
    errors = {name: run_block.squared_error([name]) for name in run_block.names}
    whole, total = run_block.damages([run_block.names])[0], sum(errors.values())
    parts = {name: error / total if total else 0.0 for name, error in errors.items()}
    return BlockDamage({name: whole * part for name, part in parts.items()}, whole)


def site_damages(held: HeldStudy, names: list[str]) -> dict[str, float]:
    """The damage of each of some sites of one block, quantized alone, by the site's name."""
    workbench = held.workbench()
    (block,) = {site.block for site in workbench.view.sites if site.name in names}
    alone = _BlockRun(workbench, block).damages([[name] for name in names])
    return dict(zip(names, alone, strict=True))


class _BlockRun:
    """One block, cut out to be run with some of its sites, `names`, quantized.

    It runs on the first of the `fit` images, on a quarter of those for sensitivity where `few`.
    Blocks before it are not run: their hidden states are there already.
    """

    def __init__(self, workbench: Workbench, block: int, *, few: bool = False) -> None:
        self.workbench, self.block, self.study = workbench, block, workbench.study
        images = self.study.sensitivity_images
        self._images = max(images // 4, 1) if few else images
        self.names = [site.name for site in workbench.sites(block, block + 1)]
        before, behind = workbench.before[block], workbench.before[block + 1]
        kept = [name for name in behind if name not in before]
        self._made = [workbench.streams[block + 1], *kept]
        self._part = Part.of(workbench.graph, workbench.streams[block], self._made)

    def squared_error(self, quantized: list[str]) -> float:
        """||error||^2 in the hidden state after the block where some sites are quantized."""
        added = self._after(quantized).stream - self._float(self.block + 1).stream
        return float(np.square(added, dtype=np.float64).sum())

    def damages(self, choices: Sequence[list[str]]) -> list[float]:
        """The damage at the outputs for each choice of sites to quantize."""
        workbench, device = self.workbench, self.study.device
        reference = workbench.fit_outputs(self._images)
        with workbench.tail(self.block + 1).open(device, workbench.at_once) as tail:
            return [
                float(output_errors(reference, tail(self._after(names), workbench.batch)).mean())
                for names in choices
            ]

    def _float(self, block: int) -> State:
        return self.workbench.fit_state(block, self._images)

    def _after(self, quantized: list[str]) -> State:
        """The state after the block where some of its sites are quantized."""
        scales = {name: self.workbench.scales[name] for name in quantized}
        state = self._float(self.block)
        part = self._part.with_graph(self.workbench.quantize(self._part.graph, scales))
        with part.open(self.study.device, self.workbench.at_once) as compute:
            hidden, *more = compute(state, self.workbench.batch)
        return State(hidden, {**state.others, **dict(zip(self._made[1:], more, strict=True))})
