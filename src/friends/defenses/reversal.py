"""Reversal of triggers: the smallest patch that turns every image into one of a given class. Machinery.

The search that Neural Cleanse (Wang et al., IEEE S&P 2019) makes for each class t, with mask m in [0, 1]^(h x w) and
pattern p in [0, 1]^(c x h x w), both a tanh of what is optimised::

    min over m, p of   CE(f((1 - m) x + m p), t) + cost * |m|_1       over clean images x of all classes

``cost`` is found while searching: it rises while the trigger works on a share ``reach`` of the images, and falls while
it does not. The smallest mask that worked is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.modules import logits_of
from friends.types import Progress, silent

LR, BETAS = 0.1, (0.5, 0.9)
"""Adam's, of the authors."""

IMAGES = 1024
"""Stamped images that enter the network at a time: so many classes are searched for together."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a trigger is searched for.

    Args:
        steps: passes over ``samples`` images, at most; the cost is looked at after each.
        samples: images per step, drawn anew for each; all, if there are fewer.
        per_update: images per update.
        cost: what the mask costs per pixel once the trigger has worked for ``patience`` steps; 0 before.
        reach: share of images, of those of a step, that a trigger must bring to its class.
        patience: steps in a row before the cost rises or falls; five times as many without a smaller mask, once
            it has done both, end the search.
        grow: the factor that the cost rises by; it falls by the 1.5th power of it.
    """

    steps: int
    samples: int
    per_update: int
    cost: float
    reach: float
    patience: int
    grow: float

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "per_update", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not 0 < self.cost < float("inf") or not 1 < self.grow < float("inf"):
            raise ValueError(f"cost > 0 and grow > 1 expected, not {self.cost} and {self.grow}")
        if not 0 < self.reach <= 1:
            raise ValueError(f"reach is the share of images that a trigger must work on, in (0, 1], not {self.reach}")


@dataclass(frozen=True, eq=False)
class Reversed:
    """A trigger for each of some classes.

    Args:
        masks: ``(k, 1, h, w)`` in [0, 1].
        patterns: ``(k, c, h, w)`` pixels in [0, 1].
        reached: ``(k,)`` whether it worked on the share of images that was asked for. Where none did, the mask is
            all ones: the whole image is covered.
    """

    masks: Float[Tensor, "k 1 h w"]
    patterns: Float[Tensor, "k c h w"]
    reached: Bool[Tensor, " k"]

    @property
    def norms(self) -> Float[Tensor, " k"]:
        """The l1 norm of each mask, in pixels: h * w covers the image."""
        return self.masks.flatten(1).sum(1)


def stamped(
    x: Float[Tensor, "*#b c h w"], mask: Float[Tensor, "*#b 1 h w"], pattern: Float[Tensor, "*#b c h w"]
) -> Float[Tensor, "*_ c h w"]:
    """Images with a trigger on them: ``(1 - mask) x + mask pattern``, one for all of them or one for each."""
    return (1 - mask) * x + mask * pattern


def reverse(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    classes: Sequence[int],
    search: Search,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Reversed:
    """The smallest trigger that was found for each of some classes.

    The classes are searched for side by side: they see the same batches, and each has its own mask, cost and end, so
    none has a part in another's result.

    Args:
        model: in eval mode with frozen weights (``friends.modules.still``).
        x: clean pixels in [0, 1], of all classes.
        classes: the classes.
        search: how.
        generator: on the device of ``x``.
    """
    state = _State.draw(x, len(classes), generator)
    target = torch.tensor(classes, device=x.device)
    adam = torch.optim.Adam([state.u, state.v], lr=LR, betas=BETAS)
    for step in range(search.steps):
        order = torch.randperm(len(x), generator=generator, device=x.device)[: search.samples]
        active = (~state.done).nonzero().flatten()
        hits = torch.zeros(len(active), dtype=torch.int64, device=x.device)
        for rows in order.split(search.per_update):
            loss, hit = _loss(model, x[rows], target[active], state, active)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            hits += hit
        state.judge(active, hits / len(order) >= search.reach, search)
        progress("reversing triggers", step + 1, search.steps)
        if bool(state.done.all()):
            break
    return state.best


def _loss(
    model: nn.Module,
    x: Float[Tensor, "b c h w"],
    target: Int64[Tensor, " a"],
    state: _State,
    active: Int64[Tensor, " a"],
) -> tuple[Float[Tensor, ""], Int64[Tensor, " a"]]:
    """The sum of the losses of the active classes, and how many images of the batch each trigger won."""
    mask, pattern = state.mask[active], state.pattern[active]
    shown = stamped(x[None], mask[:, None], pattern[:, None])
    logits = logits_of(model, shown.flatten(0, 1))
    wanted = target.repeat_interleave(len(x))
    misses = F.cross_entropy(logits, wanted, reduction="sum") / len(x)
    sizes = (state.cost[active] * mask.flatten(1).sum(1)).sum()
    return misses + sizes, (logits.detach().argmax(1) == wanted).view(len(target), -1).sum(1)


@dataclass(eq=False)
class _State:
    """A search in progress, for several classes at once: all but the images are per class, in the first dimension."""

    u: Tensor
    v: Tensor
    best: Reversed
    cost: Float[Tensor, " k"]
    worked: Int64[Tensor, " k"]
    failed: Int64[Tensor, " k"]
    rose: Bool[Tensor, " k"]
    fell: Bool[Tensor, " k"]
    stale: Int64[Tensor, " k"]
    done: Bool[Tensor, " k"]

    @classmethod
    def draw(cls, x: Float[Tensor, "n c h w"], classes: int, generator: torch.Generator) -> _State:
        """A start from uniformly random masks and patterns."""
        k, (c, h, w) = classes, x.shape[1:]
        u, v = (
            torch.rand(k, planes, h, w, generator=generator, device=x.device).clamp(1e-3, 1 - 1e-3) for planes in (1, c)
        )
        u, v = (torch.atanh(2 * part - 1).requires_grad_() for part in (u, v))
        none = torch.zeros(k, dtype=torch.bool, device=x.device)
        never = torch.zeros(k, dtype=torch.int64, device=x.device)
        whole = Reversed(x.new_ones(k, 1, h, w), (v.detach().tanh() + 1) / 2, none.clone())
        return cls(u, v, whole, x.new_zeros(k), never.clone(), never.clone(), none.clone(), none.clone(), never, none)

    @property
    def mask(self) -> Float[Tensor, "k 1 h w"]:
        return (self.u.tanh() + 1) / 2

    @property
    def pattern(self) -> Float[Tensor, "k c h w"]:
        return (self.v.tanh() + 1) / 2

    def judge(self, active: Int64[Tensor, " a"], good: Bool[Tensor, " a"], search: Search) -> None:
        """After a step: keep the masks that are smaller than all before, and change the costs."""
        works = torch.zeros_like(self.done)
        works[active] = good
        better = self._keep(works)
        self._weigh(works, search)
        self.stale = torch.where(better | ~self.best.reached, 0, self.stale + 1)
        self.done |= self.rose & self.fell & (self.stale >= 5 * search.patience)

    def _keep(self, works: Bool[Tensor, " k"]) -> Bool[Tensor, " k"]:
        mask, pattern = self.mask.detach(), self.pattern.detach()
        smaller = mask.flatten(1).sum(1) < self.best.norms
        better = works & (smaller | ~self.best.reached)
        here = better[:, None, None, None]
        self.best = Reversed(
            torch.where(here, mask, self.best.masks),
            torch.where(here, pattern, self.best.patterns),
            self.best.reached | works,
        )
        return better

    def _weigh(self, works: Bool[Tensor, " k"], search: Search) -> None:
        """Raise the cost of masks that have worked for ``patience`` steps in a row, lower that of those that failed."""
        self.worked, self.failed = torch.where(works, self.worked + 1, 0), torch.where(works, 0, self.failed + 1)
        up, down = self.worked >= search.patience, self.failed >= search.patience
        first = up & (self.cost == 0)  # what happened at cost 0 is forgotten
        risen = torch.where(first, search.cost, self.cost * search.grow)
        self.cost = torch.where(up, risen, torch.where(down, self.cost / search.grow**1.5, self.cost))
        self.rose, self.fell = (self.rose | up) & ~first, (self.fell | down) & ~first
        self.worked, self.failed = torch.where(up, 0, self.worked), torch.where(down, 0, self.failed)
