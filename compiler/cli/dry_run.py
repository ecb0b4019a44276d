"""What `regcache compile --dry-run` prints, apart from the command that it stands in for."""

from pathlib import Path

from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import write_text
from regcache.compiler.plan.forecast import forecast
from regcache.compiler.plan.table import describe_forecast, forecast_table


def foretell(options: CompileOptions, out: Path, json: Path | None) -> None:
    """Measure this machine and print what compiling is expected to take; see forecast."""
    found = forecast(options, out, CommandReporter())
    if json is not None:
        write_text(json, found.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_tables([forecast_table(found)])
        print_lines([describe_forecast(found)])
