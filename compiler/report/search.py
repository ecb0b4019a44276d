"""The section on registers: candidates, what was tried, the decision and its interval."""

from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.report.page import Figure, Part, Section, Sentence, Table
from regcache.compiler.report.plot import (
    WIDE,
    Bands,
    Dot,
    Label,
    Line,
    Plot,
    Series,
    limits,
    polyline,
    short,
    x_scale,
    y_scale,
)
from regcache.compiler.report.subject import Subject

_HEIGHT, _INTERVAL_HEIGHT = 280, 150


def search_section(subject: Subject) -> Section:
    """Whether registers ship, from which candidates, after which trials, and why."""
    curation = subject.manifest.curation
    parts: list[Part] = [Sentence(_sentence(curation.reason))]
    if curation.n_images:
        counts = ", ".join(f"{count} to {use}" for use, count in curation.n_images.items())
        parts.append(
            Sentence(
                f"The search had {sum(curation.n_images.values())} images ({counts}), set out from "
                f"block {curation.sensitive_block} and judged {curation.screened} choices by "
                "their ranges alone."
            )
        )
    if curation.out_of_time:
        parts.append(Sentence("--search-budget ended the search before it was through."))
    if curation.improvement is not None:
        parts.append(_decision(curation.improvement))
    if curation.finished is not None:
        parts.append(_finished(curation.finished))
    if curation.ablation:
        parts.append(_ablation(curation))
    measured = [item for item in curation.tried if item.error is not None]
    if measured and curation.error_without is not None:
        parts.append(_trials(curation, curation.error_without))
    elif curation.n_images:
        parts.append(Sentence("No setting was spliced and measured: no screen promised a gain."))
    if curation.candidates:
        parts.append(_candidates(curation))
    return Section("registers", "The search for registers", parts)


def _finished(found: Improvement) -> Sentence:
    """What registers do for the model as it ships."""
    verdict = "helps for certain" if found.certain else "does not help for certain, so none ship"
    return Sentence(
        f"The finished model was compared on the same images, too: error {short(found.without)} "
        f"without and {short(found.with_setting)} with the best setting, which {verdict}."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _ablation(curation: CurationRecord) -> Table:
    """Registers and deletion, each alone and both."""
    rows = [
        (
            row.part,
            str(row.setting),
            "refused" if row.error is None else short(row.error),
            "" if row.improvement is None else short(row.improvement.gain),
            "" if row.improvement is None else short(row.improvement.gain_low),
            "" if row.improvement is None else short(row.improvement.gain_high),
            "" if row.largest_norm is None else f"{row.largest_norm:.3g}",
        )
        for row in curation.ablation
    ]
    behind = f"largest token norm behind block {curation.sensitive_block}"
    header = ("what", "setting", "error", "gain", "interval, from", "interval, to", behind)
    return Table("Registers and deletion, apart and together", header, rows, texts=2)


def _candidates(curation: CurationRecord) -> Table:
    used = curation.setting.candidates
    rows = [
        (
            str(number),
            "" if item.image is None else f"image {item.image}, token {item.token}",
            "yes" if number in used else "",
            "embeddings" if item.block < 0 else str(item.block),
            f"{item.norm:.3g}",
            str(item.members),
        )
        for number, item in enumerate(curation.candidates)
    ]
    header = ("number", "stood in (empty: a mean)", "ships", "behind block", "norm", "tokens alike")
    return Table("Candidates", header, rows, texts=3, folded=True)


def _trials(curation: CurationRecord, without: float) -> Figure:
    """The error of every setting that was measured, beside that without registers."""
    tried = [(item, item.error) for item in curation.tried if item.error is not None]
    errors = [error for _, error in tried]
    bands, y = Bands(len(tried)), y_scale(*limits([*errors, without]), _HEIGHT)
    dots = [
        Dot(
            bands(at),
            y(error),
            "c" if error < without else "d",
            f"{item.setting}: {short(error)}",
            large=item.setting == curation.setting,
        )
        for at, (item, error) in enumerate(tried)
    ]
    stems = [Line(polyline([(d.x, y(without)), (d.x, d.y)]), "quiet") for d in dots]
    rule = Line(polyline([(bands(-0.5), y(without)), (bands(len(tried) - 0.5), y(without))]),
                "quiet", True)  # fmt: skip
    best = min(errors)
    plot = Plot(
        "Error of every setting that was measured",
        f"{len(tried)} settings; the best has {short(best)}, none of them {short(without)}.",
        WIDE, _HEIGHT, bands.ticks(1), y.ticks(), "setting, in the order of the search",
        "1 - cosine to float", lines=[*stems, rule], dots=dots,
    )  # fmt: skip
    rows = [("-", "none", "", short(without), "")]
    rows += [
        (
            str(number),
            str(item.setting),
            "yes" if item.setting == curation.setting else "",
            "" if item.error is None else short(item.error),
            item.refused or "",
        )
        for number, item in enumerate(curation.tried, 1)
    ]
    header = ("number", "setting", "ships", "error", "refused because")
    table = Table("Settings", header, rows, texts=3)
    about = (
        "Mean error on the ranking images with each setting spliced, calibrated and quantized. "
        "Below the dashed line a setting is better than none."
    )
    legend: list[tuple[Series, str, bool]] = [
        ("c", "better", False),
        ("d", "worse", False),
        ("quiet", "without registers", False),
    ]
    return Figure("What was tried", about, [plot], table, legend)


def _decision(found: Improvement) -> Figure:
    """The gain on images that the search never saw, with its interval, beside zero."""
    low, high = limits([found.gain_low, found.gain_high])
    x = x_scale(low, high)
    middle = 72.0
    verdict = "lies above zero: registers ship" if found.certain else "holds zero: none ship"
    plot = Plot(
        "The gain on new images, and its 95 % interval",
        f"The gain is {short(found.gain)}; its interval, {short(found.gain_low)} to "
        f"{short(found.gain_high)}, {verdict}.",
        WIDE, _INTERVAL_HEIGHT, x.ticks(), (), "gain: error without - error with", "",
        lines=[
            Line(polyline([(x(0), 24), (x(0), _INTERVAL_HEIGHT - 66)]), "quiet", True),
            Line(polyline([(x(found.gain_low), middle), (x(found.gain_high), middle)]), "a"),
            *(
                Line(polyline([(x(end), middle - 9), (x(end), middle + 9)]), "a")
                for end in (found.gain_low, found.gain_high)
            ),
        ],
        dots=[Dot(x(found.gain), middle, "a", f"gain {short(found.gain)}", large=True)],
        labels=[Label(x(0) + 6, 36, "no gain")],
    )  # fmt: skip
    rows = [
        ("images", str(found.n_images)),
        ("error without", short(found.without)),
        ("error with", short(found.with_setting)),
        ("gain", short(found.gain)),
        ("interval, from", short(found.gain_low)),
        ("interval, to", short(found.gain_high)),
    ]
    about = (
        f"The best setting on {found.n_images} images that the search never saw. The 95 % "
        f"bootstrap interval of its gain {verdict}."
    )
    return Figure("The decision", about, [plot], Table("The decision", ("what", "value"), rows))
