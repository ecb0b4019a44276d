"""What the RegCache paper reports (arXiv 2510.04547), as far as we know its tables."""

import re
from collections.abc import Collection
from types import MappingProxyType
from typing import NamedTuple


class PaperFigures(NamedTuple):
    """Zero-shot top-1 on ImageNet's validation images, W8A8, as shares of 1.

    `naive`: ranges as observed, without registers; `both`: with RegCache's registers and deletion;
    `registers`, `deletion`: with one of them alone, None where we do not know it.
    """

    naive: float
    registers: float | None
    deletion: float | None
    both: float


METRIC = "zero-shot top-1"
"""The metric of the paper's figures."""

# Base quantizers and bit-widths of the paper for which no single figure is known are left out, and
# RepQ-ViT, which is none of ours.
_FIGURES = MappingProxyType(
    {
        "CLIP": PaperFigures(0.3401, None, None, 0.5971),
        "SigLIP": PaperFigures(0.6971, 0.7437, 0.4241, 0.7438),
        "SigLIP 2": PaperFigures(0.2604, 0.2382, 0.6906, 0.7235),
    }
)
# Sources that are the B/16 encoders of the paper, at 224 pixels.
_SOURCES = (
    ("CLIP", r"hf:openai/clip-vit-base-patch16|openclip:ViT-B-16(-quickgelu)?/openai"),
    ("SigLIP", r"hf:google/siglip-base-patch16-224|openclip:ViT-B-16-SigLIP/webli"),
    ("SigLIP 2", r"hf:google/siglip2-base-patch16-224|openclip:ViT-B-16-SigLIP2/webli"),
)
_SYNSET = re.compile(r"n\d{8}")


def paper_figures(source: str, classes: Collection[str]) -> PaperFigures | None:
    """The paper's figures of a source, classified among ImageNet's 1,000 synsets; None for none."""
    if len(classes) != 1000 or not all(_SYNSET.fullmatch(name) for name in classes):
        return None
    named = (name for name, pattern in _SOURCES if re.fullmatch(pattern, source))
    return next((_FIGURES[name] for name in named), None)
