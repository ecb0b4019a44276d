"""The options of `regcache compile` alone, in the panels of its --help."""

from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.cli.configuration import repeats
from regcache.compiler.cli.options import (
    ACTIVATIONS,
    IMAGES,
    INPUT,
    OUTPUT,
    QUALITY,
    REGISTERS,
    REPORT,
    SPEED,
)
from regcache.compiler.job.effort import Effort, Preset, RegisterChoice
from regcache.compiler.job.options import AttentionChoice, Calibrator, Rounding
from regcache.compiler.job.targets import Precision, Simulation

CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="IMAGES",
        help=f"Images to calibrate on: {IMAGES}; bf16 and fp16 need none.",
        rich_help_panel=INPUT,
    ),
]
MaxImagesOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=2**31 - 1,
        help="Of more images, so many are drawn by --seed.",
        rich_help_panel=INPUT,
    ),
]
FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="ARTIFACT",
        is_eager=True,
        callback=repeats,
        help="Compile as this artifact was; what else is given goes before its options.",
        rich_help_panel=INPUT,
    ),
]
NoFloatOption = Annotated[
    bool, typer.Option("--no-float", help="Keep no float.onnx.", rich_help_panel=OUTPUT)
]
SeedOption = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="Seed of all that is drawn at random.", rich_help_panel=QUALITY
    ),
]
CalibratorOption = Annotated[
    Calibrator,
    typer.Option(help="How the range of an activation is chosen.", rich_help_panel=QUALITY),
]
PrecisionOption = Annotated[
    Precision, typer.Option(help="What the linears compute in.", rich_help_panel=QUALITY)
]
SimulateOption = Annotated[
    Simulation | None,
    typer.Option(help="Other bit-widths, as fake quantization.", rich_help_panel=QUALITY),
]
EqualizeOption = Annotated[
    bool,
    typer.Option(
        "--equalize/--no-equalize",
        help="Whether channels are equalized.",
        rich_help_panel=ACTIVATIONS,
    ),
]
RotateOption = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate",
        help="Whether attention's values are rotated, and what --int8-share leaves room for; by "
        "default they are, but for --effort fast and --simulate, where --rotate rotates all.",
        rich_help_panel=ACTIVATIONS,
    ),
]
RoundingOption = Annotated[
    Rounding, typer.Option(help="How weights become integers.", rich_help_panel=QUALITY)
]
HalfOption = Annotated[
    bool | None,
    typer.Option(
        "--half/--no-half",
        help="The rest in FP16; by default for TensorRT.",
        rich_help_panel=ACTIVATIONS,
    ),
]
AttentionOption = Annotated[
    AttentionChoice | None,
    typer.Option(
        help="Attention's own products: int8 both (TensorRT), scores q k^T alone (OpenVINO, its "
        "default), float neither.",
        rich_help_panel=QUALITY,
    ),
]
AcceptSlowerOption = Annotated[
    bool,
    typer.Option(
        "--accept-slower",
        help="Ship it though it is slower than float here.",
        rich_help_panel=SPEED,
    ),
]
RegistersOption = Annotated[
    RegisterChoice | None,
    typer.Option(
        help="Whether to search for registers; auto by default, fast: off.",
        rich_help_panel=REGISTERS,
    ),
]
PresetOption = Annotated[
    Preset | None,
    typer.Option(
        help="A bundle of options; those that are given go before it.",
        rich_help_panel=QUALITY,
    ),
]
EffortOption = Annotated[
    Effort,
    typer.Option(
        help="How much is tried; other options go before it (docs/cost.md).",
        rich_help_panel=SPEED,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what it would take, and write nothing.", rich_help_panel=REPORT
    ),
]
