"""A torch.nn.Module that lives in this process, traced to an ONNX file as it stands."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regcache.export.extras import quiet, reason, require
from regcache.export.save_onnx import save_model
from regcache.export.to_onnx import trace
from regcache.passes.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# A batch of 1 would be baked in; one more than is traced with shows that the batch is free.
_TRACED, _COMPUTED = 2, 3


@dataclass(frozen=True)
class Computed:
    """What a module computed of random images, to compare its ONNX file with.

    `images` [3, ...]: of the example's shape and type. `outputs` [3, ...] each, by name: float32,
    or integers. `half`: whether some were in less than float32.
    """

    images: NDArray[Any]
    outputs: Mapping[str, NDArray[Any]]
    half: bool


def check_example(example: object) -> "Tensor":
    """`example` where it is a batch of images: [B, 3, H, W] or [B, H, W, 3], floats or uint8.

    Raises InputError, in one line, where it is anything else.
    """
    import torch

    if not isinstance(example, torch.Tensor):
        given = "none" if example is None else f"a {type(example).__name__}"
        raise InputError(
            "a torch.nn.Module needs an example input, a tensor such as "
            f"example=torch.zeros(1, 3, 224, 224); there is {given}"
        )
    shape = list(example.shape)
    if len(shape) != 4 or 0 in shape or 3 not in (shape[1], shape[3]):
        raise InputError(f"the example is {shape}, no batch of images [B, 3, H, W] or [B, H, W, 3]")
    if not example.is_floating_point() and example.dtype != torch.uint8:
        raise InputError(f"the example holds {example.dtype}; images are floats, or uint8")
    return example


def export_module(module: "nn.Module", example: "Tensor", path: Path, name: str) -> Computed:
    """Write `module` to `path` as ONNX: "pixel_values", as `example` is, -> its outputs by name.

    The batch is free, everything else static; weights past 2 GB go to `NAME.onnx.data`. The module
    is traced in eval mode and without gradients, and left as it was. An output is every tensor
    with a row for each image; it is called as its key or field, or output_0, output_1 in a tuple.
    Returns what the module itself computes, to hold the file against.
    Raises InputError, beginning with `name`, where the module does not take the example, gives no
    such tensor, or cannot be traced; MissingExtraError where onnxscript is not installed.
    """
    import torch

    require(f"exporting a {name.partition(' ')[0]}", "onnxscript")
    weight = next(module.parameters(), example)
    first = example.detach()[:1].to(weight.device)
    with _evaluating(module), torch.no_grad(), quiet():
        images = _random_images(first)
        computed = _named_outputs(_call(module, images, name), len(images))
        if not computed:
            raise InputError(f"{name}: gives no tensor with a row for each image")
        try:
            model = trace(_only_outputs(module, list(computed)), _repeated(first), list(computed))
        except Exception as error:  # the exporter's errors share no other base
            raise InputError(
                f"{name}: PyTorch cannot export it with a free batch: {_root_cause(error)}"
            ) from error
        save_model(model, path)
    arrays = {key: _as_array(tensor) for key, tensor in computed.items()}
    half = any(tensor.is_floating_point() and tensor.itemsize < 4 for tensor in computed.values())
    return Computed(_as_array(images), arrays, half)


def module_outputs(module: "nn.Module", images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a module computes of a batch, by the names that exporting it gives its outputs.

    It runs where its weights are, in eval mode and without gradients, and is left as it was.
    Raises InputError where it does not take the images.
    """
    import torch

    name = f"torch.nn.Module {type(module).__name__}"
    weight = next(module.parameters(), None)
    batch = torch.from_numpy(images)
    if weight is not None:
        batch = batch.to(weight.device)
    with _evaluating(module), torch.no_grad(), quiet():
        computed = _named_outputs(_call(module, batch, name), len(batch))
    return {key: _as_array(tensor) for key, tensor in computed.items()}


@contextmanager
def _evaluating(module: "nn.Module") -> Iterator[None]:
    """Eval mode for a while; every part then gets back the mode that it had."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _call(module: "nn.Module", images: "Tensor", name: str) -> object:
    try:
        return module(images)
    except Exception as error:  # whatever somebody's forward raises
        raise InputError(
            f"{name}: fails on images {list(images.shape)} of {images.dtype}: {reason(error)}"
        ) from error


def _random_images(like: "Tensor") -> "Tensor":
    """[3, ...] of the example's shape, dtype and device; the same every time."""
    import torch

    random = torch.Generator().manual_seed(0)
    shape = (_COMPUTED, *like.shape[1:])
    if like.dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(like.device)
    return torch.rand(shape, generator=random).to(like)


def _repeated(image: "Tensor") -> "Tensor":
    return image.repeat(_TRACED, 1, 1, 1)


def _only_outputs(module: "nn.Module", names: list[str]) -> "nn.Module":
    """The module as one that returns those of its tensors, in that order."""
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = module

        def forward(self, images: "Tensor") -> "tuple[Tensor, ...]":
            found = dict(_tensors(self.vision(images)))
            return tuple(found[name] for name in names)

    # Not by eval(): that would be the module's mode too.
    encoder = Encoder()
    encoder.training = False
    return encoder


def _named_outputs(found: object, batch: int) -> "dict[str, Tensor]":
    return {
        name: tensor
        for name, tensor in _tensors(found)
        if tensor.ndim > 0 and len(tensor) == batch and not tensor.is_complex()
    }


def _tensors(found: object, name: str = "") -> "Iterator[tuple[str, Tensor]]":
    """Every tensor in what a module returned, however it is nested, by a name for an output."""
    import torch

    parts: Iterable[tuple[object, object]]
    if isinstance(found, torch.Tensor):
        yield name or "output", found
        return
    if isinstance(found, Mapping):
        parts = found.items()
    elif dataclasses.is_dataclass(found):
        parts = vars(found).items()
    elif hasattr(found, "_asdict"):  # a named tuple
        parts = found._asdict().items()
    elif isinstance(found, (tuple, list)):
        parts = enumerate(found)
        name = name or "output"
    else:
        return
    for key, part in parts:
        yield from _tensors(part, f"{name}_{key}" if name else str(key))


def _as_array(tensor: "Tensor") -> NDArray[Any]:
    """A tensor as NumPy array; half precision, of which NumPy lacks bfloat16, becomes float32."""
    tensor = tensor.cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)


def _root_cause(error: BaseException) -> str:
    """The first line of what an error goes back to: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
