"""`regcache doctor` on the command line."""

from pathlib import Path

import typer
from rich.table import Table

from regcache.compiler.cli.options import JsonOption
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.inspection.doctor import Diagnosis, examine
from regcache.compiler.job.staging import write_text


def doctor_command(json: JsonOption = None) -> None:
    """Tell what is installed here, what a missing piece costs, and the command that installs it.

    Exit code 1 where something that is installed does not work.
    """
    diagnosis = examine()
    if json is not None:
        write_text(json, diagnosis.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_tables([_table(diagnosis)])
        print_lines(_fixes(diagnosis))
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _table(diagnosis: Diagnosis) -> Table:
    table = Table()
    for name in ("piece", "state", "what there is, or what its absence costs"):
        table.add_column(name, overflow="fold")
    for finding in diagnosis.findings:
        said = (finding.found, finding.fault, finding.costs)
        table.add_row(finding.name, finding.state, "; ".join(text for text in said if text))
    return table


def _fixes(diagnosis: Diagnosis) -> list[str]:
    """A line for each piece that a command would mend, the broken ones first."""
    mended = [finding for finding in diagnosis.findings if finding.fix]
    mended.sort(key=lambda finding: finding.state != "broken")
    return [f"{finding.name}: {finding.fix}" for finding in mended]
