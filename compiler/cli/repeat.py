"""`regcache compile --from ARTIFACT`: the options that an artifact was compiled with, once more."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from regcache.compiler.artifact.artifact import MODEL, Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.job.effort import FP4_SHARE
from regcache.compiler.job.options import CompileOptions
from regcache.export.source import refuse_memory
from regcache.passes.errors import InputError
from regcache.runtime.list_images import is_pattern

# What decides on the others' defaults, or on which of them may be given.
_DECIDING = ("source", "images", "preset", "effort", "target", "precision", "simulate", "prefer")
# How a compilation ran and not what it made; a scheduler is sent code, so no file names one.
_OF_THE_MACHINE = frozenset({"threads", "scheduler"})


@dataclass(frozen=True)
class Recorded:
    """The manifest of an artifact that is compiled once more."""

    artifact: Path
    manifest: Manifest

    @classmethod
    def read(cls, artifact: Path) -> Self:
        """Open an artifact and check its files.

        Raises InputError as that does, and where its source was an object in memory.
        """
        manifest = Artifact.open(artifact).manifest
        refuse_memory(manifest.options.source)
        return cls(artifact, manifest)

    def below(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were recorded, with those `given` in their places.

        What the recorded preset and effort stood for is no option of its own: another one decides
        anew. Raises InputError where the recorded images are not here and no others were given.
        """
        options = self.manifest.options
        plain = CompileOptions(**{name: getattr(options, name) for name in _DECIDING})
        recorded = {
            name: value
            for name, value in dict(options).items()
            if name not in _OF_THE_MACHINE
            and (name in _DECIDING or value != getattr(plain, name))
            and value is not None
        }
        if "effort" not in given and "preset" in given:
            recorded.pop("effort")
        if FP4_SHARE in given:
            recorded.pop("int8_share", None)
        images = Path(options.images)
        if "images" not in given and options.images and not _are_here(images):
            raise InputError(f"{images}: the images are not here: name them with --images")
        return {**recorded, **given}

    def compare(self, manifest: Manifest) -> str:
        """One line: whether the new artifact has the recorded model, and if not what differs."""
        if manifest.files[MODEL] == self.manifest.files[MODEL]:
            return f"{MODEL} is the same as in {self.artifact}, byte by byte"
        before, now = self.manifest, manifest
        differs = {
            "the source": before.source.sha256 != now.source.sha256,
            "options": _decisive(before.options) != _decisive(now.options),
            "the number of images": before.calibration.images != now.calibration.images,
            "the version of regcache": before.regcache != now.regcache,
            "versions of libraries": before.versions != now.versions,
            "the number formats of this CPU": before.quantization.why != now.quantization.why,
        }
        known = [name for name, other in differs.items() if other]
        reason = ", ".join(known) if known else "the images, or this machine"
        return f"{MODEL} is another than in {self.artifact}: what differs is {reason}"


def _are_here(images: Path) -> bool:
    return images.exists() or is_pattern(images)


def _decisive(options: CompileOptions) -> dict[str, Any]:
    return options.model_dump(exclude={*_OF_THE_MACHINE, "images"})
