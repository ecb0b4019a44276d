"""What `regcache inspect` found, as tables for a terminal."""

from rich.table import Table
from rich.text import Text

from regcache.compiler.inspection.record import Inspection, OutlierRecord
from regcache.passes.errors import one_line


def inspection_tables(found: Inspection) -> list[Table]:
    """The inspection as tables for a terminal."""
    prefix = "unknown" if found.prefix_tokens is None else str(found.prefix_tokens)
    shape = Table(
        title=f"{one_line(found.source)}: {len(found.blocks)} blocks, width {found.width}, "
        f"{found.heads} heads of {found.head_dim}, {found.tokens} tokens ({prefix} before patches)"
    )
    for name in ("block", "activation", "linears [K x N]"):
        shape.add_column(name)
    for block in found.blocks:
        linears = ", ".join(f"{name} {k}x{n}" for name, (k, n) in block.linears.items())
        shape.add_row(str(block.index), block.activation, linears)
    tables = [shape, _output_table(found)]
    return [*tables, _stream_table(found), _site_table(found)] if found.n_images else tables


def _output_table(found: Inspection) -> Table:
    kind = "class scores, " if found.class_scores else ""
    table = Table(title="Outputs")
    for name in ("output", "shape", "taken for"):
        table.add_column(name)
    for item in found.outputs:
        why = f"the embedding ({kind}{found.embedding_why})"
        role = {"embedding": why, "tokens": "the tokens", None: ""}[item.role]
        table.add_row(*map(_cell, (item.name, f"[{', '.join(map(str, item.shape))}]", role)))
    return table


def _cell(text: str) -> Text:
    """A cell without markup: brackets in names are printed as they are."""
    return Text(one_line(text))


def _stream_table(found: Inspection) -> Table:
    table = Table(
        title=f"Residual stream after each block, token norms over {found.n_images} images"
    )
    for name in ("block", "l-inf median", "p99", "max", "l2 median", "p99", "max", "largest value"):
        table.add_column(name, justify="right")
    for block in found.blocks:
        if block.stream is None:
            continue
        norms = (block.stream.linf, block.stream.l2)
        cells = [f"{n:.3g}" for norm in norms for n in (norm.median, norm.p99, norm.maximum)]
        table.add_row(str(block.index), *cells, _largest(block.stream.outliers))
    return table


def _site_table(found: Inspection) -> Table:
    table = Table(title="Activations that feed the linears")
    for name in (
        "site",
        "low",
        "high",
        "token l-inf median",
        "p99",
        "max / median",
        "largest value",
    ):
        table.add_column(name, justify="right")
    for block in found.blocks:
        for site in block.activations or ():
            numbers = (site.low, site.high, site.linf.median, site.linf.p99, site.outlier_ratio)
            table.add_row(
                f"{block.index}.{site.site}",
                *(f"{number:.3g}" for number in numbers),
                _largest(site.outliers),
            )
    return table


def _largest(outliers: list[OutlierRecord]) -> str:
    if not outliers:
        return ""
    first = outliers[0]
    return f"{first.value:.3g} at {first.kind} token {first.token}, channel {first.channel}"
