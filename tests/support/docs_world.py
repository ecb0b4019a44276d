"""Small files under the names that the documents use, so that what they show can be run as it is.

What stands for a model of somebody's is a tiny encoder. The table of stand-ins is all that is
changed in a command or program before it runs.
"""

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from support import own_quantizer
from support.command_line import run_regcache
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit

from regcache.export.onnx_file import sidecar

ENCODER = "encoder.onnx"
CALIBRATION = ("photos", "calibration", "DIR", "IMAGES", "CALIBRATION")
EVALUATION = ("evaluation", "others", "other-photos", "OTHER_DIR", "EVALUATION")
MADE = ".made"
"""A folder that the copies of a world share, for what takes longest to make."""
ARTIFACTS = ("ARTIFACT", "artifact", "A", "B", "dinov2-int8", "vit-int8")

STAND_INS: dict[str, str] = {
    # a name that is fetched from a hub, or a placeholder -> the tiny encoder's file
    r"(hf|timm|openclip|sample):[^\s\"']+": ENCODER,
    r"\bSOURCE\b": ENCODER,
    # weights are not fetched, and 22 million of them not compiled
    r"pretrained=True": "pretrained=False, depth=1, embed_dim=48, num_heads=3",
}
"""What is put in the place of a regular expression, in commands and in programs."""

EXTRA: dict[str, list[str]] = {
    # Of a tiny encoder int8 may be slower than float.
    "compile": ["--accept-slower", "--threads", "1"],
    "bench": ["--seconds", "0.01", "--threads", "1"],
    # Two more builds for times that nobody reads here.
    "build": ["--no-predict"],
}
"""What is said besides, by command."""

UNLESS: dict[str, list[str]] = {
    # beside these options it would be refused, or say something else -> what saves time
    r"--(registers|effort|search-budget|scheduler|config|from|preset)": ["--registers", "off"],
    r"--(rounding|effort|config|from|preset)": ["--rounding", "nearest"],
    r"--(equalize|no-equalize|config|from|preset)": ["--no-equalize"],
    r"--(int8-share|precision|prefer|effort|config|from|preset|target cpu)": ["--int8-share", "1"],
}
"""What is said besides of `compile`, where its command has none of these options."""

CANNOT_HERE = {
    # what a command asks for -> what its one line says where there is none
    r"--device cuda": r"finds no CUDA|CUDA",
    r"--runner \S*(cuda|tensorrt)": r"no GPU|CUDA|is not installed|needs (tensorrt|polygraphy)",
    r"--engine tensorrt( |$)": r"needs (tensorrt|polygraphy|a GPU)|no GPU",
    r"--precision bf16": r"this CPU computes none|needs openvino",
}
"""Commands for another machine: they may end with 2 where they cannot run, and have to say why."""


def build_world(folder: Path) -> Path:
    """Write the files, in some 2 seconds; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder.with_name(f"{folder.name}.made")
    shared.mkdir()
    (folder / MADE).symlink_to(shared)
    (folder / "names.txt").write_text("tench\ngoldfish\n")
    onnx.save(TinyVit(SPEC).model(), folder / ENCODER)
    sidecar(folder / ENCODER).write_text(RECIPE.to_json())
    for names, count, seed in ((CALIBRATION, 24, 1), (EVALUATION, 9, 2)):
        photos(folder / names[0], count, seed=seed)
        for name in names[1:]:
            (folder / name).symlink_to(names[0])
    for name in ("elsewhere", "datasets", "shards"):
        (folder / name).mkdir()
    (folder / "elsewhere" / "photos").symlink_to("../photos")
    (folder / "datasets" / "validation").symlink_to("../evaluation")
    with tarfile.open(folder / "shards" / "0.tar", "w") as shard:
        shard.add(folder / "photos", arcname="")
    _quantizer(folder / "modelopt-env" / "bin" / "python")
    shutil.copy(own_quantizer.__file__, folder / "modelopt_quantizer.py")
    picture = Image.open(folder / "photos" / "00.png").convert("RGB")
    for name in ("a.jpg", "b.jpg", "photo.jpg", "IMAGE.ppm"):
        picture.save(folder / name)
    np.save(folder / "IMAGE.npy", np.asarray(picture))
    tokens = np.random.default_rng(3).standard_normal((2, SPEC.width)).astype(np.float32)
    np.save(folder / "tokens.npy", tokens)
    (folder / "preprocess.json").write_text(RECIPE.to_json())
    (folder / "thresholds.toml").write_text("cosine_mean = 0.99\n")
    _labelled(folder)
    command = ("compile", folder / ENCODER, "--images", folder / "photos", *EXTRA["compile"])
    outcome = run_regcache(*command, "--registers", "off", "-o", folder / ARTIFACTS[0])
    assert outcome.code == 0, outcome
    for name in ARTIFACTS[1:]:
        shutil.copytree(folder / ARTIFACTS[0], folder / name)
    return folder


def _quantizer(python: Path) -> None:
    """The interpreter of somebody's environment, in which this one stands for their quantizer."""
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


def _labelled(folder: Path) -> None:
    """Folders of classes, and captions, as `reproduce` reads them."""
    for part in ("val", "train"):
        for number, name in enumerate(("n01440764", "n01443537")):
            photos(folder / "imagenet" / part / name, 4, seed=10 + number)
    pictures = photos(folder / "coco" / "val2017", 2, seed=20)
    lines = [
        json.dumps({"image": f"val2017/{path.name}", "captions": ["a room"]})
        for path in sorted(pictures.iterdir())
    ]
    (folder / "coco" / "captions.jsonl").write_text("\n".join(lines) + "\n")


def with_stand_ins(text: str) -> str:
    """A command or program as it is run here."""
    for pattern, stand_in in STAND_INS.items():
        text = re.sub(pattern, stand_in, text)
    return text
