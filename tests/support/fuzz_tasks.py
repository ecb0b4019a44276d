"""What is done with a hostile file: commands on mutated encoders, `embed` of mutated images."""

import functools
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import typer
import typer.main
from numpy.typing import NDArray
from PIL import Image
from support.fuzz_outcome import Outcome, cause_of, cut, forget_peak, judge, peak_megabytes
from support.image_mutations import Picture, draw_image
from support.onnx_mutations import Sample, draw

_LARGEST_FILE = 2**28
_commands = functools.cache(typer.main.get_command)
_FAST = ("--registers", "off", "--accept-slower", "--threads", "1")


@dataclass
class MutatedEncoder:
    """`inspect` of every file; some of those that it accepts are compiled, then embed images.

    `images`: a folder to calibrate on and to embed. `compiled`: one of how many; None: of none.
    """

    images: Path | None = None
    compiled: int | None = None
    draw: Callable[[int], Sample] = draw

    def __call__(self, seed: int, folder: Path) -> Outcome:
        """The outcome of the last command that was run."""
        home, artifact = folder / "file", folder / "artifact"
        for left in (home, artifact):
            shutil.rmtree(left, ignore_errors=True)
        home.mkdir()
        path = self.draw(seed).write(home)
        forget_peak()
        outcome = run_command(seed, folder, ["inspect", str(path)])
        if self.images is None or not self.compiled or outcome.kind != "ok":
            return outcome
        if (seed // 7) % self.compiled:  # not in step with what a seed decides in the file
            return outcome
        options = ["--images", str(self.images), "-o", str(artifact), *_FAST]
        outcome = run_command(seed, folder, ["compile", str(path), *options])
        return self._embed(seed, artifact) if outcome.kind == "ok" else outcome

    def _embed(self, seed: int, artifact: Path) -> Outcome:
        import regcache

        assert self.images is not None
        paths = sorted(self.images.iterdir())
        try:
            with regcache.load(artifact, threads=1) as embedder:
                vectors = embedder.embed(paths)
        except BaseException as error:  # what compiled has to run
            cause = cause_of(error)
            return Outcome(seed, "traceback", cause, cut(error), peak_megabytes(), "embed")
        kind = "ok" if len(vectors) == len(paths) else "unclear"
        return Outcome(seed, kind, "rows", "", peak_megabytes(), "embed")


def run_command(seed: int, folder: Path, command: list[str]) -> Outcome:
    """Run the command line in this process. The second argument is the hostile file."""
    from regcache.compiler.cli import main as cli

    typer.main.get_command = _commands  # a sixth of the time of `inspect` on a tiny file
    for name in ("out", "err"):
        os.truncate(folder / name, 0)
    path = Path(command[1])
    sys.argv = ["regcache", *command]
    code: Any = 0
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, hard))  # not for its own files
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # it is what is looked for
        cause = cause_of(error)
        return Outcome(seed, "traceback", cause, cut(error), peak_megabytes(), command[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sys.stdout.flush()
        sys.stderr.flush()
    said = [(folder / name).read_bytes().decode(errors="replace") for name in ("out", "err")]
    err = said[1].replace(str(path), path.name).replace(str(path.parent), "FOLDER")
    err = err.replace(str(folder / "artifact"), "ARTIFACT")
    return replace(judge(seed, code or 0, said[0], err, folder), stage=command[0])


@dataclass
class MutatedImage:
    """A mutated image between two good ones: `embed` gives three rows, whatever it is.

    `artifact`: whose vectors of the good ones always have to be the same.
    """

    artifact: Path
    good: Path
    draw: Callable[[int], Picture] = draw_image
    _opened: tuple[Any, NDArray[np.float32]] | None = field(default=None, init=False)

    def __call__(self, seed: int, folder: Path) -> Outcome:
        """ok where the image was read, refused where it is a row of NaN."""
        embedder, expected = self._open()
        path = self.draw(seed).write(folder)
        forget_peak()
        try:
            vectors = embedder.embed([self.good, path, self.good], batch_size=3, on_error="nan")
            if seed % 4 == 0:
                _embed_opened(embedder, path)
        except BaseException as error:  # it is what is looked for
            return Outcome(seed, "traceback", cause_of(error), cut(error), peak_megabytes())
        finally:
            path.unlink()
        finite = np.isfinite(vectors[1])
        if not (np.array_equal(vectors[0], expected) and np.array_equal(vectors[2], expected)):
            kind, cause = "unclear", "another vector of a good image"
        elif finite.any() != finite.all():
            kind, cause = "unclear", "a row that is NaN in part"
        else:
            kind, cause = ("ok" if finite.all() else "refused"), ""
        return Outcome(seed, kind, cause, "", peak_megabytes(), "embed")

    def _open(self) -> tuple[Any, NDArray[np.float32]]:
        """Opened in the worker: threads do not survive a fork."""
        import regcache

        if self._opened is None:
            embedder = regcache.load(self.artifact, threads=1)
            self._opened = embedder, embedder.embed(self.good)[0]
        return self._opened


def _embed_opened(embedder: Any, path: Path) -> None:
    """The same as an image of Pillow's, which is decoded only when it is embedded."""
    try:
        image = Image.open(path)
    except Exception:  # the caller's own
        return
    with image:
        embedder.embed([image], on_error="nan")


def draw_images(folder: Path, count: int = 4) -> Path:
    """A folder with images of noise to calibrate on."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
