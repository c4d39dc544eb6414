"""The attacks on features written from their papers' equations, slowly: one poison, one stage at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import nnls
from torch import Tensor

from friends.models import Classifier


def stages(model: Classifier, x: Tensor) -> list[Tensor]:
    """What the layers of a network's body make of images, cut before every layer that has weights; flattened."""
    x, out, began = model.normalize(x), list[Tensor](), False
    for layer in model.body:  # type: ignore[union-attr]
        has_weights = any(p.ndim > 1 for p in layer.parameters())
        if has_weights and began:
            out.append(x.flatten(1))
        began = began or has_weights
        x = layer(x)
    return [*out, x.flatten(1)]


def bullseye_stages(of_poisons: list[Tensor], of_goal: list[Tensor], form: str) -> Tensor:
    """Both distances of Bullseye Polytope over several stages."""
    total = torch.zeros(()).to(of_goal[0])
    for poisons, goal in zip(of_poisons, of_goal, strict=True):
        mean = sum(row for row in poisons) / len(poisons)
        away, wanted = mean - goal.mean(0), goal.mean(0)
        if form == "authors":
            total = total + (away**2).sum() ** 0.5 / (wanted**2).sum() ** 0.5
        else:
            total = total + (away**2).mean() / (wanted**2).mean()
    return total / len(of_goal)


def collision(features: Callable[[Tensor], Tensor], poisons: Tensor, goal_x: Tensor) -> Tensor:
    """How far the poisons are from the goal in feature space: squared, each by itself, in the mean."""
    wanted = features(goal_x)[0]
    return sum(((features(one[None])[0] - wanted) ** 2).sum() for one in poisons) / len(poisons)  # type: ignore[return-value]


def algorithm_1(
    features: Callable[[Tensor], Tensor],
    base: Tensor,
    goal: Tensor,
    *,
    watermark: float,
    beta: float,
    lam: float,
    steps: int,
) -> Tensor:
    """Poison Frogs for one base image, without a bound; the step falls where the objective is above its recent mean."""
    wanted = features(goal[None])[0]
    b = watermark * goal + (1 - watermark) * base

    def distance(p: Tensor) -> Tensor:
        return ((features(p[None])[0] - wanted) ** 2).sum()

    def objective(p: Tensor) -> float:
        return float(distance(p).detach()) + beta * float(((p - b) ** 2).sum())

    p, history = b, [objective(b)]
    for _ in range(steps):
        leaf = p.clone().requires_grad_()
        forward = p - lam * torch.autograd.grad(distance(leaf), leaf)[0]
        new = ((forward + 2 * lam * beta * b) / (1 + 2 * lam * beta)).clamp(0, 1)
        if objective(new) <= sum(history[-40:]) / len(history[-40:]):
            p = new
        else:
            lam = lam / 2
        history.append(objective(p))
    return p


def bounded_collision(
    features: Callable[[Tensor], Tensor],
    base: Tensor,
    goal: Tensor,
    *,
    watermark: float,
    xi: float,
    lam: float,
    steps: int,
) -> Tensor:
    """The poisoning benchmark's version for one base image: a watermarked start, a clip, no step for the worse."""
    wanted = features(goal[None])[0]

    def distance(p: Tensor) -> Tensor:
        return ((features(p[None])[0] - wanted) ** 2).sum()

    def clip(p: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(p, base + xi), base - xi).clamp(0, 1)

    p = clip(watermark * goal + (1 - watermark) * base)
    for _ in range(steps):
        leaf = p.clone().requires_grad_()
        before = distance(leaf)
        new = clip(p - lam * torch.autograd.grad(before, leaf)[0])
        if float(distance(new).detach()) <= float(before.detach()):
            p = new
        else:
            lam = lam / 5
    return p


def nearest_combination(points: Tensor, wanted: Tensor) -> Tensor:
    """The coefficients of the convex combination of points that is nearest to the wanted one, by an active-set solver.

    That they sum to 1 is one more equation, of great weight; those that are 0 are so exactly.
    """
    a, w = points.detach().double().T, wanted.detach().double()
    weight = 1e5 * float(a.abs().max())
    left = torch.cat([a, torch.full((1, a.shape[1]), weight).double()])
    c, _ = nnls(left.numpy(), torch.cat([w, torch.tensor([weight]).double()]).numpy(), maxiter=10_000)
    return torch.from_numpy(c / c.sum())


def polytope_score(of_poisons: list[Tensor], of_goal: list[Tensor]) -> Tensor:
    """Convex Polytope's objective over stages and goal images, with the best coefficients for these poisons."""
    total, parts = torch.zeros(()).to(of_goal[0]), 0
    for poisons, goal in zip(of_poisons, of_goal, strict=True):
        for wanted in goal:
            c = nearest_combination(poisons, wanted)
            mixed = sum(float(weight) * poison for weight, poison in zip(c, poisons, strict=True))
            total = total + ((wanted - mixed) ** 2).sum() / (wanted**2).sum() / 2
            parts += 1
    return total / parts


def project_by_bisection(v: Tensor) -> Tensor:
    """The nearest point of the simplex: the shift that makes what is left sum to 1 is found by halving."""
    low, high = float(v.min()) - 1, float(v.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((v - middle).clamp_min(0).sum()) > 1 else (low, middle)
    return (v - high).clamp_min(0)
