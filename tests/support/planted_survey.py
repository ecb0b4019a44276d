"""What the modules of an encoder put out: all of it for one block, moments for every block."""

from typing import Any, NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Of one module's output, per channel over all tokens, and the length of a typical token."""

    mean: Tensor
    std: Tensor
    peak: Tensor
    length: Tensor


def run_blocks(model: Any, hidden: Tensor, start: int, stop: int) -> Tensor:
    for block in model.encoder.layer[start:stop]:
        hidden = block(hidden)
    return hidden


def watch(block: Any, hidden: Tensor) -> dict[str, Tensor]:
    """What the block's modules put out."""
    attention, mlp, found = block.attention, block.mlp, dict[str, Tensor]()
    modules = {"norm1": block.norm1, "q": attention.q_proj, "k": attention.k_proj}
    modules |= {"v": attention.v_proj, "norm2": block.norm2, "fc1": mlp.fc1}
    modules |= {"act": mlp.activation_fn, "block": block}

    def keep(name: str) -> Any:
        return lambda _, __, output: found.__setitem__(name, output)

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    block(hidden)
    for hook in hooks:
        hook.remove()
    return found


def survey(model: Any, images: Tensor) -> list[dict[str, Moments]]:
    """Of every block; "class" is what the class token would be if the model ended there."""
    hidden, seen = model.embeddings(images), []
    for block in model.encoder.layer:
        now = watch(block, hidden)
        hidden = now["block"]
        now["class"] = model.layernorm(hidden[:, :1])
        tokens = {name: output.flatten(0, 1) for name, output in now.items()}
        seen.append(
            {
                name: Moments(
                    x.mean(0), x.std(0, correction=0), x.abs().amax(0), x.norm(dim=1).median()
                )
                for name, x in tokens.items()
            }
        )
    return seen
