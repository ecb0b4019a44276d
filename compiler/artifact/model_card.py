"""README.md of an artifact: a model card as Hugging Face's hub reads it.

The same manifest and recipe give the same card. Names in it come from sources and files, which
anybody may have written: each stands in a code span that it cannot leave, or in a YAML string.
"""

import json
import re
from pathlib import Path

from regcache.compiler.artifact.card_code import onnxruntime_code, repeating_command
from regcache.compiler.artifact.manifest import FileRecord, Manifest
from regcache.compiler.job.staging import CARD
from regcache.compiler.job.targets import TargetName
from regcache.export.source import is_in_memory, is_onnx
from regcache.passes.errors import printable
from regcache.passes.preprocess import Preprocess

_REPOSITORY = "https://github.com/regcache/regcache"
_HUB = re.compile(r"(?:hf|timm:hf-hub):([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)
_RUNS_IN = {
    TargetName.ORT_CPU: "ONNX Runtime on CPUs",
    TargetName.OPENVINO: "OpenVINO on CPUs",
    TargetName.TENSORRT: "TensorRT",
    TargetName.TENSORRT_RTX: "TensorRT for RTX",
}
_COMPARED = {
    "calibration": "of the calibration images",
    "held-out": "of the images that calibrated nothing",
    "given": "of the images that were given",
    "drawn": "pictures drawn at random",
}


def with_card(manifest: Manifest, recipe: Preprocess, folder: Path) -> Manifest:
    """Write the card of an artifact whose other files lie in `folder`; the manifest that lists it.

    Its users may edit it: the hash in the manifest only tells whether they did.
    """
    path = folder / CARD
    path.write_text(model_card(manifest, recipe), encoding="utf-8", newline="\n")
    files = manifest.files | {CARD: FileRecord.of(path)}
    return manifest.model_copy(update={"files": dict(sorted(files.items()))})


def model_card(manifest: Manifest, recipe: Preprocess) -> str:
    """The text of the card: Markdown behind a head of YAML."""
    sections = [_head(manifest), *_about(manifest, recipe), *_making(manifest)]
    return "\n\n".join([*sections, *_loading(manifest, recipe), *_limits(manifest)]) + "\n"


def base_model(source: str) -> str | None:
    """The id on Hugging Face's hub that a source names; None where it names none.

    A folder of that name would have been taken in its place.
    """
    found = _HUB.fullmatch(source)
    return None if found is None or Path(found[1]).expanduser().is_dir() else found[1]


def _head(manifest: Manifest) -> str:
    base = base_model(manifest.source.name)
    fields = {"library_name": "regcache", "pipeline_tag": "image-feature-extraction"}
    if base is not None:
        fields = {"base_model": base, "base_model_relation": "quantized"} | fields
    tags = ["onnx", "regcache", "vision", manifest.target.value, manifest.number_format]
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _about(manifest: Manifest, recipe: Preprocess) -> list[str]:
    encoder = manifest.encoder
    axes = "3, height, width" if recipe.layout == "nchw" else "height, width, 3"
    embedding = "the first output" if encoder.embedding is None else _code(encoder.embedding)
    facts = [
        f"Input: {recipe.dtype} [batch, {axes}] of {recipe.height} x {recipe.width} pixels; "
        "`preprocess.json` says how a picture becomes one.",
        f"Embedding: {embedding}.",
        f"Encoder: {encoder.blocks} blocks of width {encoder.width}, {encoder.heads} heads.",
        *_number_formats(manifest),
        *(f"`{name}`: {manifest.files[name].size / 1e6:.1f} MB." for name in _models(manifest)),
    ]
    return [
        f"# {_code(_short(manifest.source.name))} in {manifest.number_format}",
        f"An image encoder for {_RUNS_IN[manifest.target]}, compiled by [regcache]({_REPOSITORY}) "
        f"{_from(manifest.source.name)}.",
        "\n".join(f"- {fact}" for fact in facts),
    ]


def _number_formats(manifest: Manifest) -> list[str]:
    record = manifest.quantization
    if not manifest.quantizes:
        return ["Nothing is quantized."]
    if record.activation_bits is None:
        return [f"Weights of {record.weight_bits} bits; activations are float."]
    left = len(record.left_float)
    groups = "1 group of linears stays" if left == 1 else f"{left} groups of linears stay"
    kept = f"; {groups} float" if left else ""
    registers = manifest.curation.setting.carried
    added = f"it carries {registers or 'no'} register{'' if registers == 1 else 's'}"
    return [
        f"Activations of {record.activation_bits} bits, weights of {record.weight_bits}, in "
        f"{100 * record.int8_share:.1f} % of the linears' work{kept}; {added}.",
    ]


def _making(manifest: Manifest) -> list[str]:
    result, skipped = manifest.parity.result, len(manifest.calibration.skipped)
    language = "python" if is_in_memory(manifest.source.name) else "sh"
    read = f"Calibration read {manifest.calibration.images} images"
    read += f" and skipped {skipped}." if skipped else "."
    figures = [
        ("Cosine of the embeddings, mean", f"{result.cosine_mean:.5f}"),
        ("Cosine of the worst image", f"{result.cosine_min:.5f}"),
        ("Signal to noise", f"{result.sqnr_db:.1f} dB"),
        ("Images with the same nearest other image", f"{100 * result.nn_agreement:.0f} %"),
    ]
    if result.patch_cosine_mean is not None:
        figures.append(("Cosine of the patch tokens, mean", f"{result.patch_cosine_mean:.5f}"))
    rows = [f"| {name} | {value} |" for name, value in figures]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [
        "## How close it is to float",
        f"A first look at {result.n_images} {_COMPARED[manifest.parity.images]}, beside the float "
        "encoder; `regcache parity` measures it on images of yours.",
        "\n".join(["| figure | value |", "| --- | --- |", *rows]),
        "## How it was made",
        _block(language, repeating_command(manifest)),
        f"{read if manifest.quantizes else 'No image was needed.'} "
        f"Made with regcache {manifest.regcache}: {printable(versions)}. `manifest.json` has every "
        "option, range and decision.",
    ]


def _loading(manifest: Manifest, recipe: Preprocess) -> list[str]:
    openvino = manifest.target is TargetName.OPENVINO
    extra = "[openvino]" if openvino else ""
    with_regcache = (
        "import regcache\n\n"
        'with regcache.load(".") as encoder:  # this folder\n'
        '    embeddings = encoder.embed(["photo.jpg"])  # float32 [1, D]'
    )
    return [
        "## How to load it",
        "With regcache, which checks every file first:",
        _block("sh", f'pip install "regcache{extra} @ git+{_REPOSITORY}"'),
        _block("python", with_regcache),
        "From the hub, without the file that the hub adds: "
        '`huggingface_hub.snapshot_download("NAME/OF_THIS", ignore_patterns=".gitattributes")` '
        "names the folder.",
        "With ONNX Runtime, NumPy and Pillow alone, an RGB photograph at a time:",
        _block("python", onnxruntime_code(recipe, manifest.encoder.embedding)),
    ]


def _limits(manifest: Manifest) -> list[str]:
    calibrated = ", calibrated on" if manifest.parity.images == "calibration" else ""
    limits = [
        f"The figures above are of few images{calibrated}: they promise nothing for others.",
        "What the original cannot do, or does wrong, holds for this one, too.",
    ]
    if manifest.target is TargetName.ORT_CPU and manifest.quantizes:
        limits.append("Its speed was checked on the CPU that compiled it, and on no other.")
    if manifest.target.profile.half:
        limits.append(
            "ONNX Runtime on a CPU computes it in float, rounded as the file says: take TensorRT "
            "for its speed."
        )
    return [
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits),
        "## Licence",
        "The weights stay under the licence of the model that they come from. Whoever shares this "
        "folder names it as `license:` in the head of this file, which may be edited freely: the "
        "seal in `manifest.json` leaves it out.",
    ]


def _models(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.endswith((".onnx", ".onnx.data"))]


def _short(source: str) -> str:
    """A source's own name, without what says where it lies."""
    if is_onnx(source) or is_in_memory(source):
        return Path(source).name
    return re.split(r"[/:]", source.partition("?")[0].rstrip("/"))[-1] or source


def _from(source: str) -> str:
    base = base_model(source)
    if base is not None:
        return f"from [{base}](https://huggingface.co/{base})"
    return f"from {_code(Path(source).name if is_onnx(source) else source)}"


def _code(text: str) -> str:
    """A text as a code span, which no backtick in it ends."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"`{text}`"


def _block(language: str, code: str) -> str:
    """Lines of code as a block, which no line in it ends."""
    lines = "\n".join(map(printable, code.split("\n")))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"
