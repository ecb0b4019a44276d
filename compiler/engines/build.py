"""`regcache build`: engines from an artifact's ONNX files, kept inside the artifact."""

from pathlib import Path

from regcache.compiler.artifact.artifact import MODEL, Artifact
from regcache.compiler.artifact.engine_record import EngineRecord, inputs_key
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.signature import check_signable
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.engines.predict import predict_times
from regcache.compiler.engines.signed_model import REWRITE, engine_source, has_zero_points
from regcache.compiler.engines.toolchain import BuildOptions, Toolchain, open_toolchain
from regcache.compiler.engines.update import NewEngine, add_engines, model_hashes
from regcache.compiler.job.record import Record
from regcache.compiler.job.staging import recover
from regcache.compiler.reporter import Reporter, Step
from regcache.passes.quantized_products import quantized_products
from regcache.runtime.engine_layers import narrow_products


class EngineReport(Record):
    """One engine, built or found up to date."""

    record: EngineRecord
    """What the manifest says of it."""
    size: int
    """Its size in bytes."""
    built: bool
    """Whether it was built just now; false where it was up to date."""
    seconds: float | None
    """How long building took; None where it was up to date."""


class BuildReport(Record):
    """What `regcache build` did."""

    artifact: str
    """The artifact's folder."""
    engines: list[EngineReport]
    """The engine of the artifact's model, then that of its float original, where asked for."""


def build_engines(
    folder: Path,
    options: BuildOptions,
    reporter: Reporter,
    *,
    signing_key: Path | None = None,
    verify: Path | None = None,
) -> BuildReport:
    """Build an artifact's engines where they are missing or their inputs changed, and add them.

    The artifact is replaced as a whole, so a failure leaves it as it was. `signing_key`: a private
    key of OpenSSH's to sign the new manifest with, which a signed artifact needs. `verify`: the
    public key of whoever has to have signed it.
    Raises MissingExtraError without the library that builds; InputError where the artifact is
    damaged, the options say nothing that can be built, or a node is refused (naming it).
    """
    folder = folder.resolve()
    recover(folder)
    names = [MODEL, FLOAT] if options.with_float else [MODEL]
    with reporter.command(*(Step(_building(name), images=1) for name in names)):
        artifact = Artifact.open(folder, verify=verify)
        manifest = artifact.manifest
        models = [artifact.model, artifact.float_model] if options.with_float else [artifact.model]
        toolchain = open_toolchain(options, manifest.options.precision, reporter)
        seconds: dict[str, float] = {}
        new: list[NewEngine] = []
        files: list[str] = []
        for model in models:
            key = _key(model, toolchain, artifact)
            current = _current(manifest, key)
            if current is not None and not options.force:
                files.append(current.file)
                continue
            check_signable(folder, signing_key)
            engine, taken = _build(model, key, toolchain, artifact, options, reporter)
            new.append(engine)
            files.append(engine.record.file)
            seconds[engine.record.file] = taken
        if new:
            manifest = add_engines(folder, manifest, new, signing_key)
    records = {record.file: record for record in manifest.engines}
    reports = [
        EngineReport(
            record=records[file],
            size=manifest.files[file].size,
            built=file in seconds,
            seconds=seconds.get(file),
        )
        for file in files
    ]
    return BuildReport(artifact=str(folder), engines=reports)


def _building(model: str) -> str:
    return f"building {model}"


def _current(manifest: Manifest, key: str) -> EngineRecord | None:
    """The manifest's record of an engine built from the same inputs; None without one."""
    return next((record for record in manifest.engines if record.inputs == key), None)


def _key(model: Path, toolchain: Toolchain, artifact: Artifact) -> str:
    rewrite = {"rewrite": REWRITE} if has_zero_points(model, artifact) else {}
    return inputs_key(model_hashes(artifact.manifest, model.name), toolchain.facts | rewrite)


def _build(
    model: Path,
    key: str,
    toolchain: Toolchain,
    artifact: Artifact,
    options: BuildOptions,
    reporter: Reporter,
) -> tuple[NewEngine, float]:
    reporter.begin(_building(model.name), f"with {toolchain.description}")
    with engine_source(model, artifact, reporter) as source:
        built = toolchain.build(source)
        quantized = quantized_products(source)
        shown = options.predict and model == artifact.model
        times = predict_times(source, built, artifact, options, reporter) if shown else []
    rewrite = REWRITE if source != model else None
    for warning in built.warnings:
        reporter.warn(warning)
    if not built.layers:
        reporter.warn(f"the list of layers of {toolchain.description} could not be read")
    narrow = narrow_products(built.layers)
    if built.layers and narrow < quantized:
        reporter.warn(
            f"{toolchain.description} computes {narrow} of {quantized} quantized products of "
            f"{model.name} in 8 bits, the others in float"
        )
    record = EngineRecord.of(
        built,
        model=model.name,
        engine=toolchain.engine,
        inputs=key,
        rewrite=rewrite,
        predicted=times,
    )
    return NewEngine(record, built.engine), built.seconds
