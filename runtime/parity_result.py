"""What a comparison found, as it is written to JSON and shown in notebooks."""

from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from regcache.passes.errors import printable
from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.pixel_parity import PixelParity
from regcache.runtime.shown_table import Row, ShownTable
from regcache.runtime.tensor_parity import TensorParity
from regcache.runtime.thresholds import Check

Reference = Literal["pytorch", "float-onnx"]
# The figures that a table shows, where they were measured.
_SHOWN = (
    "cosine_mean",
    "cosine_min",
    "sqnr_db",
    "nn_agreement",
    "patch_cosine_mean",
    "top1_agreement",
    "knn_top1_float",
    "knn_top1_quantized",
    "n_images",
    "n_nonfinite",
)
_OPTIONAL = (
    "top1_agreement",
    "knn_top1_float",
    "knn_top1_quantized",
    "blocks",
    "first_jump",
    "pixels",
    "compared",
)


class Compared(FiniteRecord):
    """What was compared, so that a later comparison can tell whether it is of the same."""

    source: str
    """The artifact's source, as it was named."""
    source_sha256: str
    """SHA-256 of its ONNX form, as the manifest has it."""
    images_sha256: str
    """SHA-256 of the contents of all images together, whatever their names and order."""


class ImageCosine(FiniteRecord):
    """One image of a comparison."""

    image: str
    """Its name."""
    cosine: float
    """Cosine of its embeddings; -1 for one that is not finite."""


class ParityResult(FiniteRecord, ShownTable):
    """One comparison of embeddings [N, D]; the JSON leaves out the last ones where not measured."""

    cosine_mean: float
    """Mean cosine of the embeddings over images; an image with NaN or infinity counts as -1."""
    cosine_min: float
    """Cosine of the worst image."""
    sqnr_db: float
    """10 log10(sum reference^2 / sum error^2); 200 for equal outputs, -200 for ones not finite."""
    nn_agreement: float
    """Share of images with the same nearest other image as in float; 1 for one or two images."""
    patch_cosine_mean: float | None
    """Mean cosine over images and patch tokens; None without an output [B, T, C]."""
    n_images: int
    """Images that were compared."""
    passed: bool
    """Whether every threshold was kept to."""
    min_cosine: float
    """The least `cosine_mean` that was asked for."""
    reference: Reference
    """The original: PyTorch, or the float ONNX."""
    worst_image: str
    """Name of the image with the least cosine."""
    worst_images: tuple[ImageCosine, ...] = ()
    """The five images with the least cosines, the worst first; older files have none."""
    n_nonfinite: int
    """Images with NaN or infinity in an output."""
    checks: tuple[Check, ...]
    """Every threshold with what was measured."""
    outputs: tuple[TensorParity, ...]
    """Every output that a cosine says something of, with all of its tokens."""
    top1_agreement: float | None = None
    """Of class scores, the share of images whose largest is of the same class."""
    knn_top1_float: float | None = None
    """Share of images that float classifies right by their nearest neighbours."""
    knn_top1_quantized: float | None = None
    """The same of the compiled encoder."""
    blocks: tuple[TensorParity, ...] | None = None
    """The hidden states behind each block."""
    first_jump: str | None = None
    """Name of the first block whose error leaps."""
    pixels: PixelParity | None = None
    """What the encoder was given, beside what the source's own processor gives it."""
    compared: Compared | None = None
    """What was compared; a first look does not say."""

    @model_serializer(mode="wrap")
    def _drop_unmeasured(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return {k: v for k, v in fields.items() if v is not None or k not in _OPTIONAL}

    def failure(self) -> str | None:
        """Why the comparison falls short, in one line; None when it passed."""
        if self.passed:
            return None
        if self.n_nonfinite:
            return f"{self.n_nonfinite} of {self.n_images} images give NaN or infinity"
        return "; ".join(check.describe() for check in self.checks if not check.passed)

    def rows(self) -> list[Row]:
        """One row: every figure that is a number, and what it was held against."""
        figures = {name: getattr(self, name) for name in _SHOWN}
        return [
            {
                "passed": self.passed,
                **{name: value for name, value in figures.items() if value is not None},
                "min_cosine": self.min_cosine,
                "reference": self.reference,
                "worst_image": printable(self.worst_image),
            }
        ]
