"""Records of passes: for the manifest, and to warn of what stays slower than it could be."""

from collections.abc import Iterable

from pydantic import Field

from regcache.compiler.job.record import Record
from regcache.compiler.reporter import Reporter
from regcache.passes.base import PassRun, Skip


class PassRecord(Record):
    """What one pass did."""

    name: str
    """The pass's name."""
    edits: int
    """How many places of the graph it changed."""
    skips: list[str]
    """What it left alone: place, colon, reason."""
    slower: list[str] = Field(default_factory=list)
    """What computes slower for what it left alone, one line for each way."""


def pass_records(ran: Iterable[PassRun]) -> tuple[PassRecord, ...]:
    """The manifest's records of passes that ran."""
    return tuple(
        PassRecord(
            name=done.name,
            edits=len(done.log.edits),
            skips=[f"{skip.site}: {skip.reason}" for skip in done.log.skips],
            slower=_slower(done.name, done.log.skips),
        )
        for done in ran
    )


def tell_passes(records: Iterable[PassRecord], reporter: Reporter) -> None:
    """Warn of all that passes left slower than it could be; what they did is a detail."""
    for record in records:
        left = f", and left {len(record.skips)} alone" if record.skips else ""
        reporter.detail(f"{record.name} changed {record.edits} places{left}")
        for skip in record.skips:
            reporter.detail(f"{record.name} left {skip}")
        for line in record.slower:
            reporter.warn(line)


def _slower(name: str, skips: Iterable[Skip]) -> list[str]:
    ways: dict[str, list[Skip]] = {}
    for skip in skips:
        if skip.slower is not None:
            ways.setdefault(skip.slower, []).append(skip)
    return [f"{name} left {_listed(some)}; {slower}" for slower, some in ways.items()]


def _listed(skips: list[Skip]) -> str:
    """Places that passes left alone, with the reasons, in a few words whatever their number."""
    first, reasons = skips[0], {skip.reason for skip in skips}
    sites = first.site if len(skips) == 1 else f"{first.site} and {len(skips) - 1} more"
    others = "" if len(reasons) == 1 else " and the like"
    return f"{sites} alone: {first.reason}{others}"
