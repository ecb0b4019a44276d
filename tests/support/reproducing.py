"""Running `regcache reproduce` on a few synthetic images, and what PyTorch alone says of them."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from support import tiny_text
from support.command_line import run_regcache
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.reproduce import reproduce
from regcache.export.onnx_file import sidecar
from regcache.export.text_tower import embed_texts
from regcache.passes.preprocess import Preprocess
from regcache.runtime import images as image_files

Array = NDArray[np.float64]

CLASSES = {"n01440764": "tench", "n02123045": "tabby", "n03000001": "big thing"}
PROMPTS = ("a photo of a {}.", "see {} here")
SPEC = Spec(width=32, heads=4, hidden=64, depth=3, grid=4)
RECIPE = Preprocess(16, 16, "shortest", (18, 18), "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass
class Run:
    """What one call of the command line gave, and what was called on the way."""

    code: int = 0
    out: str = ""
    err: str = ""
    texts: list[list[str]] = field(default_factory=list)
    reads: Counter[Path] = field(default_factory=Counter)
    left_behind: list[str] = field(default_factory=list)


def run_cli(*arguments: object, scratch: Path | None = None) -> Run:
    """Run `regcache reproduce ARGS` in this process."""
    run = Run()

    def embed(source: str, texts: list[str]) -> NDArray[np.float32]:
        run.texts.append(texts)
        return embed_texts(source, texts)

    read_image = image_files.read_image

    def read(path: Path, recipe: Preprocess) -> NDArray[np.float32]:
        run.reads[path] += 1
        return read_image(path, recipe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "embed_texts", embed)
        patch.setattr(image_files, "read_image", read)
        if scratch is not None:
            patch.setattr(tempfile, "tempdir", str(scratch))
        outcome = run_regcache("reproduce", *arguments)
    run.code, run.out, run.err = outcome.code, outcome.out, outcome.err
    run.left_behind = [] if scratch is None else [path.name for path in scratch.iterdir()]
    return run


def photos(folder: Path, count: int, seed: int) -> Path:
    """Smooth random pictures, `count` in each class folder, each class a little of one colour."""
    random = np.random.default_rng(seed)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            coarse = random.integers(0, 256, (5, 6, 3))
            coarse[..., channel] = coarse[..., channel] * 3 // 4 + 64
            picture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
            picture.resize((44, 36), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    return folder


@dataclass(frozen=True)
class Files:
    """A labelled set with one broken image, a training set, class names, prompts and captions."""

    val: Path
    train: Path
    names: Path
    prompts: Path
    captions: Path

    @property
    def readable(self) -> list[Path]:
        """The images of `val`, but for the broken one."""
        return [path for path in sorted(self.val.rglob("*.png")) if path.name != "broken.png"]

    @property
    def labels(self) -> list[str]:
        """Their class folders."""
        return [path.parent.name for path in self.readable]


def write_files(root: Path) -> Files:
    """Five images of each class to evaluate, four to train on."""
    val = photos(root / "data" / "val", 5, seed=1)
    (val / "n02123045" / "broken.png").write_bytes(b"no image")
    names = root / "names.txt"
    lines = [f"{folder} {name}, a synonym" for folder, name in CLASSES.items()]
    names.write_text("\n".join([*lines, "n09999999 a class without a folder"]))
    captions = root / "data" / "captions.jsonl"
    entries = [
        {"image": f"val/n02123045/{name}.png", "captions": [f"cat {name}", f"a {name} tabby"]}
        for name in (0, 1, "broken", 2, 3)
    ]
    captions.write_text("\n".join(map(json.dumps, entries)))
    prompts = root / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return Files(val, photos(root / "train", 4, seed=2), names, prompts, captions)


def write_encoder(folder: Path) -> Path:
    """A tiny encoder as an ONNX file, which has no text encoder."""
    path = folder / "tiny.onnx"
    onnx.save(TinyVit(SPEC).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    return path


def features(folder: Path, paths: list[Path], model_class: Any) -> Array:
    """The images' embeddings by transformers alone, not normalised."""
    load: Any = transformers.AutoImageProcessor.from_pretrained
    processor = load(folder, backend="pil")
    pictures = [Image.open(path).convert("RGB") for path in paths]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixels).pooler_output
        else:
            found = model(pixels).pooler_output
    return np.asarray(found.double().numpy())


def text_features(folder: Path, texts: list[str]) -> Array:
    """One text at a time by transformers alone."""
    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        rows = [
            model.get_text_features(torch.tensor([tiny_text.clip_ids(text)])).pooler_output
            for text in texts
        ]
    return unit(torch.cat(rows).double().numpy())


def unit(rows: Array) -> Array:
    """Each row at length 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def zero_shot(
    images: Array, labels: list[str], prompts: Sequence[str], embed: Callable[[list[str]], Array]
) -> float:
    """The share of images nearest to their class; `embed`: texts -> unit rows."""
    means = [embed([p.replace("{}", name) for p in prompts]).mean(0) for name in CLASSES.values()]
    guesses = np.array(list(CLASSES))[(unit(images) @ unit(np.stack(means)).T).argmax(axis=1)]
    return float((guesses == np.array(labels)).mean())


def vote(
    images: Array, labels: list[str], known: Array, owners: list[str], *, alone: bool
) -> float:
    """The share that the 10 nearest others, weighted by exp(cosine / 0.07), classify right."""
    right, images, known = 0, unit(images), unit(known)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        near = sorted(
            ((float(image @ other), owner) for other, owner in zip(known, owners, strict=True)),
            reverse=True,
        )
        if alone:
            near.remove((float(image @ known[number]), owners[number]))
        votes = Counter[str]()
        for cosine, owner in near[:10]:
            votes[owner] += np.exp(cosine / 0.07)
        right += max(votes, key=lambda name: votes[name]) == label
    return right / len(images)
