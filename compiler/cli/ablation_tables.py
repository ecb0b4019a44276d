"""What `--ablate` measured, as a table for a terminal."""

from rich.table import Table

from regcache.compiler.curation.record import CurationRecord


def ablation_tables(found: CurationRecord) -> list[Table]:
    """The table, where somebody asked for it and something was searched."""
    if not found.ablation:
        return []
    count = found.n_images.get("decide", 0)
    table = Table(
        title=f"On {count} images that the search never saw; norms behind block "
        f"{found.sensitive_block}"
    )
    for header in ("what", "setting", "error", "gain, 95 % interval", "largest token norm"):
        table.add_column(header)
    for row in found.ablation:
        gain, seen = "", row.improvement
        if seen is not None:
            gain = f"{seen.gain:.2e} ({seen.gain_low:.1e} to {seen.gain_high:.1e})"
        error = "refused" if row.error is None else f"{row.error:.2e}"
        norm = "" if row.largest_norm is None else f"{row.largest_norm:.3g}"
        table.add_row(row.part, str(row.setting), error, gain, norm)
    return [table]
