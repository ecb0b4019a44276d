"""A forecast as a user reads it."""

from rich.table import Table

from regcache.compiler.plan.forecast import Forecast
from regcache.compiler.reporter import duration


def forecast_table(forecast: Forecast) -> Table:
    """A row for every step, then one for all of them."""
    table = Table(title=f"{forecast.source}, {forecast.images} images")
    for name in ("step", "minutes", "memory, MB", "disk, MB"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for number, step in enumerate(forecast.steps, 1):
        name = step.name if step.sure else f"{step.name}, if registers ship"
        table.add_row(f"{number}. {name}", duration(step.seconds), _mb(step.memory), _mb(step.disk))
    table.add_section()
    all_of_it = (duration(forecast.seconds), _mb(forecast.memory), _mb(forecast.disk))
    table.add_row("in all", *all_of_it)
    return table


def describe_forecast(forecast: Forecast) -> str:
    """What the forecast was made by, and what stays, as one line."""
    line = (
        f"about {duration(forecast.seconds)} at {forecast.image_seconds * 1e3:.0f} ms for an image "
        f"through the float model of {_mb(forecast.weights)} MB; at most {_mb(forecast.memory)} MB "
        f"of memory and {_mb(forecast.disk)} MB of disk ({_mb(forecast.free)} MB are free); the "
        f"artifact is about {_mb(forecast.artifact)} MB; nothing was written"
    )
    unsure = sum(step.seconds for step in forecast.steps if not step.sure)
    return line + (f"; {duration(unsure)} more where registers ship" if unsure else "")


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"
