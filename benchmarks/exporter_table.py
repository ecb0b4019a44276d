"""Print the table of docs/sources.md: what regcache makes of every form that PyTorch exports.

    PYTHONPATH=tests python benchmarks/exporter_table.py

Takes a few minutes; needs regcache[export].
"""

import tempfile
from pathlib import Path

from support.exporter_cell import measure
from support.exporter_forms import BATCH_FORMS, EXPORTERS, FAMILIES, Form

from regcache.runtime.session import silence_runtime


def main() -> None:
    """A row for every family and exporter: integer kernels of quantized linears, by batch."""
    silence_runtime()
    print(f"| family | exporter | {' | '.join(BATCH_FORMS)} |")
    print("| --- " * (2 + len(BATCH_FORMS)) + "|")
    for family in FAMILIES:
        for exporter in EXPORTERS:
            cells = [_said(Form(family, exporter, batch)) for batch in BATCH_FORMS]
            print(f"| {family} | {exporter} | {' | '.join(cells)} |", flush=True)


def _said(form: Form) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cell = measure(form, Path(folder))
    if cell.refused is not None:
        return "not written"
    return f"{cell.kernels} of {cell.linears}" + (
        "" if cell.good else f" (cosine {cell.cosine:.4f})"
    )


if __name__ == "__main__":
    main()
