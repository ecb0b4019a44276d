"""Write the report of an artifact: one HTML file that needs nothing beside itself."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.job.staging import real_path, write_text
from regcache.compiler.report.deployment import (
    kernels_section,
    latency_section,
    megabytes,
    model_bytes,
    sizes_section,
)
from regcache.compiler.report.outliers import outliers_section
from regcache.compiler.report.page import Page, Tile
from regcache.compiler.report.parity import parity_section
from regcache.compiler.report.placement import placement_section
from regcache.compiler.report.provenance import compiled_section, made_section, passes_section
from regcache.compiler.report.search import search_section
from regcache.compiler.report.sites import ranges_section, sensitivity_section
from regcache.compiler.report.subject import Subject
from regcache.compiler.report.worst import worst_section
from regcache.export.source import is_onnx
from regcache.passes.errors import InputError, MissingExtraError, printable
from regcache.runtime.parity_output import reference_name


def check_report(path: Path, artifact: Path, option: str) -> None:
    """Check that a report can be written, before what it shows is measured.

    Raises MissingExtraError without Jinja2, InputError where `path`, given as `option`, is a folder
    or lies in the artifact, where it would stand in the way of the next one.
    """
    if find_spec("jinja2") is None:
        raise MissingExtraError(option, extra="report", module="jinja2")
    if path == Path("-"):
        raise InputError(f"{option} -: name a file, the page is no text for a terminal")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; name a file in it")
    written = real_path(path)
    if real_path(artifact) in (written, *written.parents):
        raise InputError(
            f"{option} {path}: lies in the artifact, whose files are its own; write it beside"
        )


def write_report(subject: Subject, path: Path) -> None:
    """Write the page whole or not at all. Raises InputError where that cannot be done."""
    write_text(path, render(page_of(subject)))


def page_of(subject: Subject) -> Page:
    """Everything that the page says."""
    manifest, result = subject.manifest, subject.parity
    options = manifest.options
    name = manifest.source.name
    if is_onnx(name):
        name = Path(name).name
    against = reference_name(result)
    if result.passed:
        verdict = f"within its limits beside {against}, on {result.n_images} images"
    else:
        verdict = result.failure() or ""
    return Page(
        title=name,
        lead=f"The artifact {subject.name}: {options.precision.value} for {options.target.value}.",
        passed=result.passed,
        verdict=verdict,
        tiles=_tiles(subject),
        sections=[
            compiled_section(subject),
            parity_section(subject),
            worst_section(subject),
            outliers_section(subject),
            search_section(subject),
            sensitivity_section(subject),
            ranges_section(subject),
            placement_section(subject),
            kernels_section(subject),
            sizes_section(subject),
            latency_section(subject),
            passes_section(subject),
            made_section(subject),
        ],
        made_by=f"regcache {manifest.regcache}",
    )


def render(page: Page) -> str:
    """The page as HTML. Whatever a name holds, it is text on the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def plain(value: Any) -> Any:
        if isinstance(value, str) and not isinstance(value, Markup):
            return printable(value)
        return value

    environment = Environment(
        loader=PackageLoader("regcache.compiler.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page)


def _tiles(subject: Subject) -> list[Tile]:
    manifest, result = subject.manifest, subject.parity
    quantization, setting = manifest.quantization, manifest.curation.setting
    tiles = [
        Tile(f"{result.cosine_mean:.5f}", "mean cosine"),
        Tile(f"{result.cosine_min:.5f}", "worst image's cosine"),
        Tile(f"{result.nn_agreement:.1%}", "same nearest neighbour"),
    ]
    model, original = model_bytes(subject, MODEL), model_bytes(subject, FLOAT)
    share = f", {model / original:.2f} of float" if original else ""
    tiles.append(Tile(megabytes(model), f"model.onnx{share}"))
    if manifest.options.precision.quantizes and quantization.activation_bits is not None:
        tiles.append(Tile(f"{quantization.int8_share:.1%}", "of the linears' work quantized"))
    tiles.append(Tile(str(setting.carried or "none"), "registers"))
    if manifest.speed is not None and manifest.speed.ratios:
        first = manifest.speed.ratios[0]
        tiles.append(Tile(f"{first.ratio:.2f} x", f"float's time at batch {first.batch}"))
    elif subject.bench is not None:
        batches = [batch for runner in subject.bench.runners for batch in runner.batches]
        tiles += [
            Tile(f"{batch.ratio:.2f} x", f"float's time at batch {batch.batch}")
            for batch in batches[:1]
        ]
    return tiles
