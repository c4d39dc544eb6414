"""MetaPoison written from the paper's equations, slowly: real optimizers on copies of models, one image at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Minibatch = tuple[Tensor, Tensor]


def slow_margin(logits: Tensor, wanted: Tensor) -> Tensor:
    """max over the other classes of the logit, minus the wanted class's, at least -100; the mean over images."""
    each = []
    for row, w in zip(logits, wanted.tolist(), strict=True):
        others = [row[c] for c in range(len(row)) if c != w]
        each.append(torch.maximum(torch.stack(others).max() - row[w], torch.tensor(-100.0).to(row)))
    return sum(each) / len(each)  # type: ignore[return-value]


def margins_by_sgd(
    model: nn.Module, minibatches: Sequence[Minibatch], goal: Minibatch, lr: float, *, together: bool
) -> float:
    """The mean margin after 1, 2, ... steps of torch's SGD on a copy of the model, which stays in the mode it is in.

    Args:
        minibatches: poisons in place; of the last, only the forward pass with the goal is made.
        together: whether the goal is in the forward pass of the minibatch.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    margins: list[float] = []
    for k, (x, y) in enumerate(minibatches):
        logits = model(torch.cat([x, goal[0]]) if together else x)
        if k:
            asked = logits[len(y) :] if together else model(goal[0])
            margins.append(float(slow_margin(asked, goal[1]).detach()))
        optimizer.zero_grad()
        F.cross_entropy(logits[: len(y)], y).backward()
        optimizer.step()
    return sum(margins) / len(margins)


def slow_meta(
    model: nn.Module,
    poisons: Tensor,
    label: int,
    beside: Sequence[Minibatch],
    goal: Minibatch,
    lr: float,
    *,
    together: bool,
    through: str,
) -> Tensor:
    """The same as a differentiable function of the poisons: every image is in the graph of every step."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights: dict[str, Tensor] = dict(model.named_parameters())
    margins: list[Tensor] = []
    for k, (x_clean, y_clean) in enumerate(beside):
        seen = poisons if k == 0 or through == "all" else poisons.detach()
        x = torch.cat([seen, x_clean])
        y = torch.cat([torch.full((len(seen),), label), y_clean])

        def f(batch: Tensor, now: dict[str, Tensor] = weights) -> Tensor:
            return torch.func.functional_call(model, {**now, **{n: b.clone() for n, b in buffers.items()}}, (batch,))

        logits = f(torch.cat([x, goal[0]]) if together else x)
        if k:
            margins.append(slow_margin(logits[len(y) :] if together else f(goal[0]), goal[1]))
        loss = sum(-F.log_softmax(row, 0)[c] for row, c in zip(logits, y.tolist(), strict=False)) / len(y)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)  # type: ignore[arg-type]
        weights = {name: w - lr * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
    return sum(margins) / len(margins)  # type: ignore[return-value]


def numeric_gradient(f: Callable[[Tensor], float], x: Tensor, places: Sequence[tuple[int, ...]]) -> list[float]:
    """Central differences at some places."""
    slopes: list[float] = []
    for place in places:
        step = torch.zeros_like(x)
        step[place] = 1e-5
        slopes.append((f(x + step) - f(x - step)) / 2e-5)
    return slopes


def slow_recolour(image: Tensor, table: Tensor) -> Tensor:
    """One RGB image with the changes of colour of one table ``(3, g, g, g)``, pixel by pixel, corner by corner."""
    g = table.shape[1]
    out = image.clone()
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            r, green, b = (float(v) for v in image[:, i, j])
            y = 0.299 * r + 0.587 * green + 0.114 * b
            colour = (y, 0.436 / 0.886 * (b - y), 0.615 / 0.701 * (r - y))
            place = [
                min(max((c - low) * (g - 1), 0.0), g - 1.0) for c, low in zip(colour, (0, -0.5, -0.5), strict=True)
            ]
            dy, du, dv = (0.0, 0.0, 0.0)
            for a in range(g):
                for k in range(g):
                    for m in range(g):
                        near = [max(0.0, 1 - abs(p - q)) for p, q in zip(place, (a, k, m), strict=True)]
                        weight = near[0] * near[1] * near[2]
                        dy, du, dv = (old + weight * float(table[c, a, k, m]) for c, old in enumerate((dy, du, dv)))
            dr, db = dy + 0.701 / 0.615 * dv, dy + 0.886 / 0.436 * du
            out[:, i, j] += torch.tensor([dr, (dy - 0.299 * dr - 0.114 * db) / 0.587, db]).to(out)
    return out


def slow_attack(
    models: Callable[[int], nn.Module],
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    goal: Minibatch,
    *,
    order: Callable[[int, int, int], Sequence[Tensor]],
    start: Tensor,
    xi: float,
    steps: int,
    surrogates: int,
    unroll: int,
    lr_at: Callable[[int], float],
    rate: Callable[[int], float],
) -> Tensor:
    """The whole outer loop for networks without batch normalisation and without a change of colours.

    Args:
        models: a new model by its index.
        order: the minibatches of surrogate, generation and age.
        start: the additive perturbation at first.

    Returns:
        The pixels of the poisons.
    """
    delta = start.clone().requires_grad_()
    adam = torch.optim.Adam([delta], lr=1.0)
    label, position = int(y[rows[0]]), {int(row): i for i, row in enumerate(rows)}
    alive = {k: (models(k), 0, 0) for k in range(surrogates)}

    def epoch(k: int, total: Tensor | None) -> None:
        model, generation, age = alive[k]
        minibatches, lr = order(k, generation, age), lr_at(age)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for i, batch in enumerate(minibatches):
            here = [position[int(row)] for row in batch if int(row) in position]
            if total is not None and here:
                clean = [int(row) for row in batch if int(row) not in position]
                beside = [(x[clean], y[clean])]
                for j in range(1, unroll + 1):
                    later = minibatches[(i + j) % len(minibatches)][len(here) :]
                    beside.append((x[later], y[later]))
                seen = (x[rows] + delta.detach()).clamp(0, 1)[here].requires_grad_()
                score = slow_meta(model, seen, label, beside, goal, lr, together=False, through="first")
                total[here] += torch.autograd.grad(score, seen)[0] / surrogates
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        alive[k] = (model, generation, age + 1)
        if age + 1 == surrogates:
            alive[k] = (models(k + surrogates * (generation + 1)), generation + 1, 0)

    for k in range(surrogates):
        for _ in range(k):
            epoch(k, None)
    for step in range(steps):
        total = torch.zeros_like(delta)
        for k in range(surrogates):
            epoch(k, total)
        delta.grad = total
        adam.param_groups[0]["lr"] = rate(step)
        adam.step()
        with torch.no_grad():
            delta.clamp_(-xi, xi)
    return (x[rows] + delta.detach()).clamp(0, 1)
