"""Ten families, two exporters, four forms of the batch: all that PyTorch writes is compiled."""

from pathlib import Path

import pytest
from support.exporter_cell import Cell, measure
from support.exporter_forms import BATCH_FORMS, Form, all_forms

PAGE = Path(__file__).parents[2] / "docs" / "sources.md"


@pytest.mark.parametrize("form", all_forms(), ids=str)
def test_every_form_compiles_to_integers(form: Form, tmp_path: Path) -> None:
    found = measure(form, tmp_path)
    if found.refused is None:
        assert found.good, found
        assert found.batch == "batch"
    assert written(form) == said(found)


def said(cell: Cell) -> str:
    """What the page says of a form; a torch that writes it, or no longer does, changes that."""
    return "not written" if cell.refused else f"{cell.kernels} of {cell.linears}"


def written(form: Form) -> str:
    """The form's cell in the table of docs/sources.md."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == [form.family, form.exporter]:
            return cells[2 + BATCH_FORMS.index(form.batch)]
    raise AssertionError(f"{PAGE.name} has no row for {form}")
