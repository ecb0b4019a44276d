"""`regcache compile` on the command line."""

from pathlib import Path
from typing import Any

import typer

from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.cli.artifact_lines import print_artifact
from regcache.compiler.cli.compile_options import (
    AcceptSlowerOption,
    AttentionOption,
    CalibrationOption,
    CalibratorOption,
    DryRunOption,
    EffortOption,
    EqualizeOption,
    FromOption,
    HalfOption,
    MaxImagesOption,
    NoFloatOption,
    PrecisionOption,
    PresetOption,
    RegistersOption,
    RotateOption,
    RoundingOption,
    SeedOption,
    SimulateOption,
)
from regcache.compiler.cli.configuration import ConfigOption
from regcache.compiler.cli.cpu import (
    MaxErrorOption,
    MinCosineOption,
    OtherCpuOption,
    TargetChoice,
    TargetOption,
    compile_by_choice,
    target_of,
)
from regcache.compiler.cli.cpu_ways import Accuracy
from regcache.compiler.cli.dry_run import foretell
from regcache.compiler.cli.options import (
    AblateOption,
    BatchOption,
    DeviceOption,
    Fp4ShareOption,
    GpuOption,
    Int8ShareOption,
    JsonOption,
    OutOption,
    OutputOption,
    PreferOption,
    PreprocessOption,
    ReplaceOption,
    ResolutionOption,
    SchedulerOption,
    SearchBudgetOption,
    SignOption,
    SourceArgument,
    ThreadsOption,
    parse_duration,
)
from regcache.compiler.cli.repeat import Recorded
from regcache.compiler.cli.report import CompileReportOption, report_compiled
from regcache.compiler.cli.tables import print_lines
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.effort import FP4_SHARE, Effort
from regcache.compiler.job.options import Calibrator, CompileOptions, Rounding
from regcache.compiler.job.staging import write_text
from regcache.compiler.job.targets import Precision, TargetName
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.report.write import check_report
from regcache.passes.errors import InputError


def compile_command(
    ctx: typer.Context,
    out: OutOption,
    source: SourceArgument = "",
    from_: FromOption = None,
    config: ConfigOption = None,
    images: CalibrationOption = None,
    max_images: MaxImagesOption = 512,
    target: TargetOption = TargetChoice.ORT_CPU,
    preset: PresetOption = None,
    min_cosine: MinCosineOption = None,
    max_error: MaxErrorOption = None,
    other_cpu: OtherCpuOption = None,
    resolution: ResolutionOption = None,
    output: OutputOption = None,
    preprocess: PreprocessOption = None,
    no_float: NoFloatOption = False,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    calibrator: CalibratorOption = Calibrator.OUTPUT_ERROR,
    precision: PrecisionOption = Precision.INT8,
    simulate: SimulateOption = None,
    equalize: EqualizeOption = True,
    rotate: RotateOption = None,
    rounding: RoundingOption = Rounding.GPTQ,
    int8_share: Int8ShareOption = None,
    fp4_share: Fp4ShareOption = None,
    half: HalfOption = None,
    attention: AttentionOption = None,
    prefer: PreferOption = None,
    gpu: GpuOption = None,
    accept_slower: AcceptSlowerOption = False,
    registers: RegistersOption = None,
    effort: EffortOption = Effort.BALANCED,
    search_budget: SearchBudgetOption = None,
    scheduler: SchedulerOption = "threads",
    ablate: AblateOption = False,
    force: ReplaceOption = False,
    sign: SignOption = None,
    dry_run: DryRunOption = False,
    report: CompileReportOption = None,
    json: JsonOption = None,
) -> None:
    """Compile a source into an int8 artifact, calibrated on --images."""
    named = target_of(target, precision, max_error=max_error, for_=other_cpu)
    recorded = None if from_ is None else Recorded.read(from_)
    if recorded is not None and (target is TargetChoice.CPU or config is not None):
        raise InputError("--from repeats one target, as it was: no --target cpu, no --config")
    if recorded is None and not source:
        raise InputError("what is to be compiled: name a SOURCE, or an artifact with --from")
    options = _options(_fields(ctx), named, recorded)
    if report is not None:
        check_report(report, out, "--report")
    if dry_run:
        foretell(options, out, json)
        return
    if target is TargetChoice.CPU:
        accuracy = Accuracy.of(min_cosine, max_error)
        manifest = compile_by_choice(options, out, json, accuracy, other_cpu, force=force, key=sign)
    else:
        manifest = compile_encoder(options, out, CommandReporter(), force=force, key=sign)
        _print(manifest, out, json, recorded)
    if report is not None:
        report_compiled(manifest, out, report, threads, quiet=json == Path("-"))


def _print(manifest: Manifest, out: Path, json: Path | None, recorded: Recorded | None) -> None:
    """Say what was compiled, and whether it is as what it repeats."""
    if json is not None:
        write_text(json, manifest.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_artifact(manifest, out)
        if recorded is not None:
            print_lines([recorded.compare(manifest)])


def _options(
    given: dict[str, Any], target: TargetName, recorded: Recorded | None
) -> CompileOptions:
    """The options that were given, for `target`; before those of an artifact that is repeated."""
    if recorded is None:
        return CompileOptions(**{"images": "", **given, "target": target})
    return CompileOptions(
        **recorded.below({**given, "target": target} if "target" in given else given)
    )


def _fields(ctx: typer.Context) -> dict[str, Any]:
    """The fields of CompileOptions that flags, the environment or a file gave, and no default."""
    told = {
        name: value
        for name, value in ctx.params.items()
        if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }
    known = (*CompileOptions.model_fields, FP4_SHARE)
    fields = {name: told[name] for name in known if name in told}
    fields |= {name: str(told[name]) for name in ("images", "preprocess") if name in told}
    if "no_float" in told:
        fields["keep_float"] = not told["no_float"]
    if told.get("target") == TargetChoice.CPU:
        fields.pop("min_cosine", None)  # there it chooses between ways, and holds none of them
    if "search_budget" in told:
        fields["search_budget"] = parse_duration(told["search_budget"])
    return fields
