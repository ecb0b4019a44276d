"""What servers are told of a model: its name, and for clients what to do with an image."""

import re

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.job.targets import TargetName
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

_RUNTIMES = {
    TargetName.ORT_CPU: ("ONNX Runtime", "onnxruntime"),
    TargetName.OPENVINO: ("OpenVINO", "openvino"),
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def model_name(artifact: Artifact, given: str | None) -> str:
    """The model's name: `given`, or from the source a file's stem, else all behind the family.

    Raises InputError where a server cannot take it.
    """
    if given is not None:
        if not _NAME.fullmatch(given):
            raise InputError(f"{given!r} is no name for a model: use letters, digits, - _ and .")
        return given
    source = artifact.manifest.source.name
    family, _, rest = source.partition(":")
    path = source if source.endswith(".onnx") else rest or family
    is_path = path.endswith(".onnx") or path[:1] in ("/", ".", "~")
    text = re.split(r"[/\\]", path.rstrip("/\\"))[-1].removesuffix(".onnx") if is_path else path
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip("-.") or "encoder"


def check_target(artifact: Artifact, wanted: TargetName) -> None:
    """Raise InputError for an artifact of another target."""
    target = artifact.manifest.options.target
    if target is not wanted:
        raise InputError(
            f"{artifact.folder}: is for {target.value}; compile it with --target {wanted.value}"
        )


def made_with(artifact: Artifact, runtime: TargetName) -> str:
    """The runtime of a target on the CPU, and of which version on: the one that compiled."""
    named, package = _RUNTIMES[runtime]
    version = artifact.manifest.versions.get(package)
    return named if version is None else f"{named} {version} or later"


def embedding_name(artifact: Artifact) -> str:
    """The output that is the embedding, as a README begins a sentence with it."""
    name = artifact.manifest.encoder.embedding
    return "The first output" if name is None else f"`{name}`"


def numbered_steps(recipe: Preprocess) -> str:
    """The steps of preprocessing, a line for each."""
    return "\n".join(f"{at}. {step}" for at, step in enumerate(preprocessing_steps(recipe), 1))


def preprocessing_steps(recipe: Preprocess) -> list[str]:
    """What a client has to do with an image, in order."""
    high, wide = recipe.resize_to
    resize = {
        "shortest": f"scale the shorter edge to {high} pixels",
        "squash": f"scale to {high} x {wide} pixels (height x width)",
        "none": "do not resize",
    }[recipe.resize]
    resize += f", with Pillow's antialiased `{recipe.interpolation}`"
    crop = f"crop the center to {recipe.height} x {recipe.width} pixels"
    colour = recipe.background
    rgb = f"make it RGB, transparent pixels {'as stored' if colour is None else f'on {colour}'}"
    steps = [resize, crop, rgb] if recipe.rgb_last else [rgb, resize, crop]
    if recipe.dtype == "float32":
        steps.append(
            f"multiply by {recipe.rescale:.8g}, subtract {recipe.mean}, divide by {recipe.std}"
        )
    channels = "first" if recipe.layout == "nchw" else "last"
    return [*steps, f"{recipe.dtype}, channels {channels}"]
