"""`regcache inspect`: the blocks of an encoder and, with images, where its outliers stand."""

from pathlib import Path
from typing import Literal

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.prepare import SourceOptions, prepare
from regcache.compiler.inspection.measure import INSPECTING, describe_blocks, measure_blocks
from regcache.compiler.inspection.record import BlockRecord, Inspection, OutputRecord
from regcache.compiler.job.stages import EXPORTING
from regcache.compiler.job.staging import unnamed
from regcache.compiler.reporter import Reporter, Step
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import find_device
from regcache.runtime.list_images import list_images


def inspect_encoder(
    options: SourceOptions,
    images: Path | None,
    reporter: Reporter,
    *,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
) -> Inspection:
    """Find the blocks of a source and, with images, run it once and measure its activations.

    Memory is flat in the number of images. Raises InputError on bad input.
    """
    chosen = find_device(device)
    paths = [] if images is None else list_images(images, reporter.warn)
    with (
        reporter.command(EXPORTING, Step(INSPECTING, images=len(paths))),
        temporary_folder() as scratch,
        unnamed(scratch),
    ):
        encoder = prepare(options, scratch, reporter, verify=False)
        if not paths:
            return _report(options.source, encoder, describe_blocks(encoder.view), 0)
        blocks, count = measure_blocks(
            encoder, paths, reporter, batch_size=batch_size, threads=threads, device=chosen
        )
        return _report(options.source, encoder, blocks, count)


def _report(
    source: str, encoder: FloatEncoder, blocks: list[BlockRecord], images: int
) -> Inspection:
    view, outputs = encoder.view, encoder.outputs
    roles: dict[str | None, Literal["embedding", "tokens"]] = {
        outputs.tokens: "tokens",
        outputs.embedding: "embedding",
    }
    return Inspection(
        source=source,
        embedding=outputs.embedding,
        embedding_why=outputs.why,
        class_scores=outputs.class_scores,
        outputs=[
            OutputRecord(name=item.name, shape=item.shape or [], role=roles.get(item.name))
            for item in view.graph.outputs
        ],
        blocks=blocks,
        width=view.width,
        heads=view.heads,
        head_dim=view.head_dim,
        tokens=view.tokens,
        prefix_tokens=view.prefix_tokens,
        n_images=images,
    )
