"""The sections on how an artifact was made: at a glance, what passes did, options and versions."""

import re

from regcache.compiler.job.options import CompileOptions
from regcache.compiler.report.page import Cell, Facts, Section, Sentence, Table
from regcache.compiler.report.subject import Subject


def compiled_section(subject: Subject) -> Section:
    """What was compiled, for what, from what."""
    manifest = subject.manifest
    encoder, options, source = manifest.encoder, manifest.options, manifest.source
    recipe = {
        "source": "the source's own",
        "option": "given with --preprocess",
        "assumed": "assumed, as the source has none",
    }
    tokens = "an open number of" if encoder.tokens is None else str(encoder.tokens)
    images = f"{manifest.calibration.images} images" if manifest.calibration.images else "no images"
    if manifest.calibration.skipped:
        images += f"; {len(manifest.calibration.skipped)} could not be read"
    rows = [
        ("source", source.name),
        ("encoder", f"{encoder.blocks} blocks of width {encoder.width}, {encoder.heads} heads of "
                    f"{encoder.head_dim}, {tokens} tokens"),
        ("embedding", f"{encoder.embedding or 'the first output'}"
                      + (f" ({encoder.embedding_why})" if encoder.embedding_why else "")),
        ("pixels", f"{subject.recipe.height} x {subject.recipe.width}, preprocessing "
                   f"{recipe[source.recipe]}"),
        ("target", options.target.value),
        ("precision", options.precision.value
                      + (f", simulating {options.simulate.value}" if options.simulate else "")),
        ("calibrated on", images),
        ("registers", re.sub("^registers: ", "", manifest.curation.reason, flags=re.I)),
        ("compiled by", f"regcache {manifest.regcache}, on "
                        f"{manifest.device.gpu or manifest.options.device}"),
    ]  # fmt: skip
    return Section("compiled", "What was compiled", [Facts(rows)])


def passes_section(subject: Subject) -> Section:
    """What every pass over the graph changed, and what it left alone and why."""
    passes = subject.manifest.passes
    edits = sum(item.edits for item in passes)
    left = sum(len(item.skips) for item in passes)
    text = (
        f"{len(passes)} {'pass' if len(passes) == 1 else 'passes'} ran, changed {edits} places of "
        f"the graph and left {left} alone."
    )
    rows: list[list[Cell]] = []
    for item in passes:
        reasons = "; ".join([*item.slower, *item.skips]) or "nothing"
        rows.append([item.name, reasons, str(item.edits)])
    table = Table("Every pass, in order", ("pass", "left alone", "edits"), rows, 2, folded=True)
    return Section("passes", "What the passes did", [Sentence(text), table])


def made_section(subject: Subject) -> Section:
    """Options that were chosen, versions, and hashes: what it takes to make it again."""
    manifest = subject.manifest
    chosen = manifest.options.model_dump(mode="json", exclude_defaults=True)
    plain = CompileOptions(source="", images="").model_dump(mode="json")
    rest = {name: value for name, value in plain.items() if name not in chosen}
    tables = [
        Table("Options that were chosen", ("option", "value"), _words(chosen), 2),
        Table("Options left at their defaults", ("option", "value"), _words(rest), 2, folded=True),
        Table("Versions", ("library", "version"), list(manifest.versions.items()), 2, folded=True),
    ]
    text = (
        f"The source's float form has the SHA-256 {manifest.source.sha256}. The same input, "
        "options and versions give the same artifact, byte by byte."
    )
    return Section("made", "How to make it again", [Sentence(text), *tables])


def _words(options: dict[str, object]) -> list[tuple[str, str]]:
    return [(name, "not given" if value is None else str(value)) for name, value in options.items()]
