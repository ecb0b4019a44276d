"""Arguments and options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.job.effort import Preference
from regcache.passes.errors import InputError
from regcache.runtime.gpu_rates import GPUS
from regcache.runtime.openvino_options import Hint, InferencePrecision
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.thresholds import DEFAULT_MIN_COSINE

IMAGES = "a folder, a list (.txt), a 'pattern', .tar shards, a saved data set, .npy tensors"
# What a library's 32 bits hold, and no machine has more of.
MOST_IMAGES, MOST_THREADS, MOST_PIXELS = 2**16, 2**12, 2**16
# The panels of --help.
INPUT, OUTPUT, QUALITY = "Input", "Output", "Quality"
REGISTERS, SPEED, REPORT = "Registers", "Speed", "Report"
# Apart, for names with a --no- beside them need room.
ACTIVATIONS, EMBEDDING, GATE, OPENVINO = "Activations", "Embedding", "Gate", "OpenVINO"

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="FILE.onnx, hf:ID_OR_DIR, timm:NAME, timm:NAME/FILE, timm:hf-hub:ID, "
        "timm:local-dir:DIR (timm's with ?OPTION=VALUE behind), openclip:ARCH/TAG_OR_FILE, "
        "sample:dinov2-small",
    ),
]
ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A compiled folder.")]
ImagesOption = Annotated[
    Path,
    typer.Option("--images", metavar="IMAGES", help=f"Images: {IMAGES}."),
]
ResolutionOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_PIXELS,
        help="Side of the square input in pixels.",
        rich_help_panel=INPUT,
    ),
]
PreprocessOption = Annotated[
    Path | None,
    typer.Option(
        help="A preprocess.json, or transformers', open_clip's or timm's own file, "
        "in place of the source's recipe.",
        rich_help_panel=INPUT,
    ),
]
BatchOption = Annotated[
    int, typer.Option(min=1, max=MOST_IMAGES, help="Images per run.", rich_help_panel=SPEED)
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="Threads of the runtime; all CPUs by default.",
        rich_help_panel=SPEED,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda[:N]",
        help="What runs the graphs, and PyTorch's algebra.",
        rich_help_panel=SPEED,
    ),
]
RuntimeOption = Annotated[
    RuntimeName | None,
    typer.Option(
        help="What runs the artifact; by default what suits its target.", rich_help_panel=SPEED
    ),
]
InferencePrecisionOption = Annotated[
    InferencePrecision,
    typer.Option(
        metavar="KIND",
        help="What is not quantized computes in f32 or bf16; auto: in the CPU's fastest.",
        rich_help_panel=OPENVINO,
    ),
]
HintOption = Annotated[
    Hint,
    typer.Option(
        metavar="KIND",
        help="latency: one batch soon; throughput: many images side by side.",
        rich_help_panel=OPENVINO,
    ),
]
ModelCacheOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep compiled models here for the next start.",
        rich_help_panel=OPENVINO,
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the numbers to this file ('-': to stdout).", rich_help_panel=REPORT
    ),
]
SchedulerOption = Annotated[
    str,
    typer.Option(
        help="What runs the search: threads, processes, or a Dask tcp://HOST:PORT or "
        "tls://HOST:PORT.",
        rich_help_panel=REGISTERS,
    ),
]
SearchBudgetOption = Annotated[
    str | None,
    typer.Option(
        help="Time for the search: 90s, 5m, 1h; no limit by default.", rich_help_panel=REGISTERS
    ),
]
AblateOption = Annotated[
    bool,
    typer.Option(
        "--ablate",
        help="Also measure registers alone, deletion alone and both; takes more trials.",
        rich_help_panel=REGISTERS,
    ),
]
Int8ShareOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Least share of the linears' work that is quantized; by default what suits the target "
        "and the precision.",
        rich_help_panel=QUALITY,
    ),
]
Fp4ShareOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="--int8-share by the name that suits --precision nvfp4 and mxfp8: at 0.7, up to 30 % "
        "of the linears' work is in FP16, where that mends most; by default 1 and 0.9.",
        rich_help_panel=QUALITY,
    ),
]
PreferOption = Annotated[
    Preference | None,
    typer.Option(
        help="TensorRT: fastest quantizes what is predicted to save time, FP16 where nothing does.",
        rich_help_panel=SPEED,
    ),
]
GpuOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"TensorRT: time is predicted for this GPU ({', '.join(gpu.name for gpu in GPUS)}); "
        "by default for those that the target is usually built for.",
        rich_help_panel=SPEED,
    ),
]
OutOption = Annotated[
    Path, typer.Option("-o", "--out", help="Where the result goes.", rich_help_panel=OUTPUT)
]
ReplaceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an artifact though files of yours lie in it; they are moved aside.",
        rich_help_panel=OUTPUT,
    ),
]
SignOption = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Sign the manifest with OpenSSH's private key.",
        rich_help_panel=OUTPUT,
    ),
]
VerifyOption = Annotated[
    Path | None,
    typer.Option(
        "--verify",
        metavar="KEY",
        help="Refuse an artifact that is not signed by this public key.",
        rich_help_panel=INPUT,
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The output that is the embedding; by default the likeliest.",
        rich_help_panel=INPUT,
    ),
]


GateOption = Annotated[
    float | None,
    typer.Option(
        "--min-cosine",
        min=-1.0,
        max=1.0,
        metavar="COSINE",
        help=f"Least mean cosine to pass; by default the file's, or {DEFAULT_MIN_COSINE}.",
        rich_help_panel=GATE,
    ),
]
ThresholdsOption = Annotated[
    Path | None,
    typer.Option(
        help="A TOML file of thresholds, such as cosine_min = 0.98.", rich_help_panel=GATE
    ),
]
PerLayerOption = Annotated[
    bool,
    typer.Option(
        "--per-layer", help="Also compare the output of every block.", rich_help_panel=REPORT
    ),
]


def listed(values: Sequence[str]) -> list[str]:
    """The items of an option that may be repeated, and may name several with commas between."""
    return [item.strip() for value in values for item in value.split(",")]


def parse_duration(text: str) -> float:
    """Seconds of "90s", "5m", "1h" or "300". Raises InputError for anything else."""
    number, unit = (text[:-1], text[-1:]) if text[-1:] in "smh" else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise InputError(f"{text!r} is no duration: write 90s, 5m or 1h")
    return seconds
