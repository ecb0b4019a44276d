"""Ten families, two exporters, four forms of the batch: all that PyTorch writes is compiled."""

from pathlib import Path

import pytest
from exporter_cell import Cell, measure
from exporter_forms import Form, all_forms

TABLE = Path(__file__).parents[1] / "docs" / "sources.md"


@pytest.mark.parametrize("form", all_forms(), ids=str)
def test_every_form_compiles_to_integers(form: Form, tmp_path: Path) -> None:
    found = measure(form, tmp_path)
    if found.refused is None:
        assert found.good, found
        assert found.batch == "batch"
    assert row_of(form, found) in TABLE.read_text(encoding="utf-8").splitlines()


def row_of(form: Form, cell: Cell) -> str:
    """The form's line in the table of docs/sources.md."""
    kernels = "" if cell.refused else f"{cell.kernels} of {cell.linears}"
    said = "cannot be written" if cell.refused else "compiled, any batch"
    return f"| {form.family} | {form.exporter} | {form.batch} | {said} | {kernels} |"
