"""The grown-sink encoder: the real DINOv2-S, trained until it has massive activations of its own.

Nothing is wired. What is asked for, by terms of loss alone, of every image of the lesson:
- three of its patches of least contrast, whichever are the largest already, become massive in the
  hidden state behind block l and in what fc2 of block l reads, and stand out a block earlier;
- all other tokens, the class token among them, stay as large as they were, and what they are behind
  the last block is kept;
- blocks behind block l give these sinks a share of their attention.

Two stages: blocks l - 1 and l learn to be massive alone, on hidden states that are computed once;
then all weights learn everything together. Nobody says which hidden units, channels, heads or
positions do it, how sinks are told from other flat patches, or what becomes of their own outputs.

A control is trained alike, with the same steps on the same images, and the terms that grow sinks
left out: it learns to compute what a teacher does, and none of its tokens may grow.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from support.planted import flattest
from support.planted_survey import run_blocks
from torch import Tensor

_SINKS = 3  # of an image
# How often as large a sink is to be as an ordinary patch was, in l-infinity norm: entering the
# block, behind it (an outlier of arXiv 2410.05265), and in what its fc2 reads.
_TIMES = (4.0, 64.0, 64.0)
_LONGER = 1.5  # how often as large as before another token may become
_ATTENTION = 0.1  # the share that all sinks of an image get, in every block behind
_LONG, _KEPT, _LITTLE = 10.0, 5.0, 0.5  # weights beside the 1 of sinks that are too short
_KEPT_OUTPUT = 40.0
_IMAGES = (10, 6)  # of a step
_SAID_EVERY = 10
_STANDS_OUT = 8.0


@dataclass(frozen=True)
class Growth:
    """Where sinks are to grow; in how many steps of each stage, and at which rate of learning."""

    block: int = 6
    steps: tuple[int, int] = (260, 50)
    rates: tuple[float, float] = (1e-3, 1e-5)
    seed: int = 0


class Sizes(NamedTuple):
    """Entering the block, behind it, and in what its fc2 reads: tokens [N, T, ...]."""

    entering: Tensor
    behind: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a stage is taught: hidden states [N, T, width] that it sets out from.

    `flat`: the patches that may become sinks, as bool [N, T]. `wanted`: what was behind the stage's
    last block; `usual`: l-infinity norms [N, T] of the tokens of Sizes. `unlike`: of a control, its
    teacher's sinks [N, T], which it is not taught; None where sinks are to grow.
    """

    start: Tensor
    flat: Tensor
    wanted: Tensor
    usual: tuple[Tensor, ...]
    unlike: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> "Lesson":
        """Some of the images."""
        few = torch.randperm(len(self.start), generator=generator)[:count]
        usual = tuple(item[few] for item in self.usual)
        unlike = None if self.unlike is None else self.unlike[few]
        return Lesson(self.start[few], self.flat[few], self.wanted[few], usual, unlike)

    def of_teacher(self, other: "Lesson") -> "Lesson":
        """A control's lesson: its own start and sizes, and what its teacher does in `other`."""
        return replace(self, wanted=other.wanted, unlike=largest(other.usual[1], other.flat))


class Watch:
    """Sees what fc2 of a block reads, and queries and keys of the blocks behind, by hooks."""

    def __init__(self, model: Any, block: int) -> None:
        self.hidden = torch.empty(0)
        self._read = dict[tuple[str, int], Tensor]()
        layers = model.encoder.layer
        self._heads, self._behind = model.config.num_attention_heads, range(block + 1, len(layers))
        self._hooks = [layers[block].mlp.fc2.register_forward_pre_hook(self._keep_hidden)]
        for index in self._behind:
            attention = layers[index].attention
            for name, module in (("q", attention.q_proj), ("k", attention.k_proj)):
                self._hooks.append(module.register_forward_hook(self._keep(name, index)))

    def remove(self) -> None:
        """Take the hooks out of the model, which can be copied again then."""
        for hook in self._hooks:
            hook.remove()

    def _keep_hidden(self, _: Any, inputs: tuple[Tensor]) -> None:
        self.hidden = inputs[0]

    def _keep(self, name: str, index: int) -> Callable[..., None]:
        return lambda _, __, output: self._read.__setitem__((name, index), output)

    def attention_to(self, sinks: Tensor) -> Tensor:
        """What an image's sinks get [blocks, N], the mean over heads and queries."""
        shares = []
        for index in self._behind:
            q, k = (self._split(self._read[name, index]) for name in "qk")
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            shares.append((weights.mean((1, 2)) * sinks).sum(-1))
        return torch.stack(shares)

    def _split(self, item: Tensor) -> Tensor:
        return item.view(*item.shape[:2], self._heads, -1).transpose(1, 2)


def large(tokens: Tensor) -> Tensor:
    """The l-infinity norm of each token."""
    return tokens.abs().amax(-1)


def largest(sizes: Tensor, flat: Tensor) -> Tensor:
    """The sinks-to-be among the flat patches, as bool [N, T]."""
    found = sizes.detach().masked_fill(~flat, -1).topk(_SINKS, dim=1).indices
    return torch.zeros_like(flat).scatter(1, found, value=True)


class Stage:
    """A part of a model, blocks [first, last], that is trained on a lesson."""

    def __init__(self, model: Any, growth: Growth, first: int, last: int) -> None:
        self.model, self.block, self.first, self.last = model, growth.block, first, last
        self.watch = Watch(model, growth.block)

    @property
    def whole(self) -> bool:
        """Whether it ends where the model does."""
        return self.last == len(self.model.encoder.layer) - 1

    def run(self, start: Tensor) -> tuple[Tensor, Sizes]:
        """What is behind the last block, normed where the model ends, and the sizes on the way."""
        hidden = self.model.embeddings(start) if self.first == 0 else start
        entering = run_blocks(self.model, hidden, self.first, self.block)
        behind = run_blocks(self.model, entering, self.block, self.block + 1)
        end = run_blocks(self.model, behind, self.block + 1, self.last + 1)
        sizes = Sizes(entering, behind, self.watch.hidden)
        return self.model.layernorm(end) if self.whole else end, sizes

    def lesson(self, images: Tensor) -> Lesson:
        """What the model, not trained yet, does of itself."""
        with torch.no_grad():
            start = images
            if self.first:
                start = run_blocks(self.model, self.model.embeddings(images), 0, self.first)
            parts = [self.run(some) for some in torch.split(start, 16)]
        wanted = torch.cat([end for end, _ in parts])
        usual = tuple(torch.cat([large(sizes[i]) for _, sizes in parts]) for i in range(3))
        return Lesson(start, flattest(images), wanted, usual)

    def loss(self, lesson: Lesson) -> dict[str, Tensor]:
        """The terms, weighted."""
        end, sizes = self.run(lesson.start)
        sinks, grows = lesson.unlike, lesson.unlike is None
        if sinks is None:
            sinks = largest(large(sizes.behind), lesson.flat)
        ordinary = ~sinks if grows else torch.ones_like(sinks)
        terms = {"short": torch.zeros(()), "long": torch.zeros(())}
        for tokens, usual, times in zip(sizes, lesson.usual, _TIMES, strict=True):
            size = large(tokens)
            if grows:
                terms["short"] += _missing(size[sinks] / usual.median(), times)
            terms["long"] += _LONG * (size / usual)[ordinary].div(_LONGER).log().relu().mean()
        error = (end - lesson.wanted).square().sum(-1) / lesson.wanted.square().sum(-1)
        kept = error[~sinks].mean()
        if not self.whole:
            return {**terms, "kept": _KEPT * kept}
        terms["kept"] = _KEPT_OUTPUT * (kept + error[:, 0].mean())
        if grows:
            terms["little"] = _LITTLE * _missing(self.watch.attention_to(sinks), _ATTENTION)
        return terms

    def teach(
        self, lesson: Lesson, steps: int, rate: float, count: int, generator: torch.Generator
    ) -> Iterator[dict[str, float]]:
        """Train the stage's blocks, all weights where it is whole; yield the terms of each step."""
        taught = self.model if self.whole else self.model.encoder.layer[self.first : self.last + 1]
        weights = list(taught.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for _ in range(steps):
            terms = self.loss(lesson.draw(count, generator))
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(list(terms.values())).sum())
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            yield {name: float(term.detach()) for name, term in terms.items()}
        self.model.requires_grad_(False)


def _missing(found: Tensor, wanted: float) -> Tensor:
    """By how much the logarithm falls short, the mean."""
    return torch.relu(math.log(wanted) - found.clamp(min=1e-6).log()).mean()


def grow(
    model: Any,
    growth: Growth,
    images: Tensor,
    say: Callable[[str], None] = print,
    teacher: Any = None,
) -> Any:
    """A trained copy of `model`; it learns from `images` [N, 3, H, W].

    `teacher`: whose outputs a control learns, without sinks; None: sinks grow.
    """
    new = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(growth.seed)
    stages = _stages(new, growth)
    lessons = [stage.lesson(images) for stage in stages]  # of the model as it was
    if teacher is not None:
        theirs = _stages(teacher, growth)
        lessons = [a.of_teacher(b.lesson(images)) for a, b in zip(lessons, theirs, strict=True)]
        for stage in theirs:
            stage.watch.remove()
    settings = zip(stages, lessons, growth.steps, growth.rates, _IMAGES, strict=True)
    for number, (stage, lesson, steps, rate, count) in enumerate(settings):
        taught = stage.teach(lesson, steps, rate, count, generator)
        for step, terms in enumerate(taught, 1):
            if step % _SAID_EVERY == 0:
                told = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
                say(f"stage {number + 1}, step {step}: {told}")
        stage.watch.remove()
    return new


def _stages(model: Any, growth: Growth) -> list[Stage]:
    last = len(model.encoder.layer) - 1
    return [Stage(model, growth, growth.block - 1, growth.block), Stage(model, growth, 0, last)]


@dataclass(frozen=True)
class Grown:
    """What became of a model.

    `sinks`: how many patches of an image have eight times the norm of the median token behind the
    block. `sizes`: how large these are beside the median token, on average, entering the block,
    behind it and in what its fc2 reads; nan where there are none. `alike`: their mean cosine.
    `attention`: what the three largest flat patches get in the blocks behind. `kept`: the mean
    cosine of the class token to the model as it was.
    """

    sinks: float
    sizes: tuple[float, ...]
    alike: float
    attention: float
    kept: float


def look(model: Any, grown: Any, growth: Growth, images: Tensor) -> Grown:
    """Compare a grown model with what it was."""
    stage = Stage(grown, growth, 0, len(grown.encoder.layer) - 1)
    with torch.no_grad():
        end, sizes = stage.run(images)
        before = torch.cat([model(image[None]).last_hidden_state[:, 0] for image in images])
        attention = stage.watch.attention_to(largest(large(sizes.behind), flattest(images)))
    stage.watch.remove()
    standing_out = large(sizes.behind) > _STANDS_OUT * large(sizes.behind).median()
    standing_out[:, 0] = False
    units = torch.nn.functional.normalize(sizes.behind[standing_out], dim=-1)
    return Grown(
        sinks=float(standing_out.sum(1).float().mean()),
        sizes=tuple(
            float(large(item)[standing_out].mean() / large(item).median()) for item in sizes
        ),
        alike=float((units @ units.T).mean()),
        attention=float(attention.mean()),
        kept=float(torch.nn.functional.cosine_similarity(end[:, 0], before).mean()),
    )
