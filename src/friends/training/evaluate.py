"""The judge. Attacks and defenses never compute their own success: this module does, once, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.training.defense import Predictor
from friends.types import ABSTAIN

BATCH = 1000


@dataclass(frozen=True)
class Accuracy:
    """Clean accuracy, counted with and without abstentions.

    Args:
        correct: right answers.
        abstained: refusals to answer.
        n: images.
    """

    correct: int
    abstained: int
    n: int

    @property
    def strict(self) -> float:
        """Right answers among all images: an abstention is wrong. The headline number."""
        return self.correct / self.n

    @property
    def selective(self) -> float:
        """Right answers among those given; 0 if none was."""
        answered = self.n - self.abstained
        return self.correct / answered if answered else 0.0


def predict(predictor: Predictor, x: Tensor, *, batch: int = BATCH) -> Int64[Tensor, " n"]:
    """Predictions, on the CPU, for bytes or pixels ``(n, c, h, w)``, batch by batch."""
    parts = [predictor(part.float() / 255 if part.dtype == torch.uint8 else part).cpu() for part in x.split(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def accuracy(predictor: Predictor, data: LabeledImages) -> Accuracy:
    """Accuracy on clean images. Raises ``ValueError`` if there are none."""
    if len(data) == 0:
        raise ValueError("accuracy on no image is undefined")
    answer = predict(predictor, data.x)
    return Accuracy(int((answer == data.y.cpu()).sum()), int((answer == ABSTAIN).sum()), len(data))


def success(predictor: Predictor, goal: Goal, device: torch.device | str = "cpu") -> Bool[Tensor, " m"]:
    """For each image of the goal, whether the predictor answers with the class that the attacker wants.

    Being merely wrong is no success, and neither is an abstention. The images are shown as they are: not augmented,
    without noise. Measure it after the last epoch; a targeted attack has one image, so this is its 0 or 1.
    """
    return predict(predictor, goal.x.to(device)) == goal.y_wanted.cpu()


def confidence(model: nn.Module, goal: Goal, device: torch.device | str = "cpu") -> Float[Tensor, " m"]:
    """The softmax probability that the model gives to the class that the attacker wants, per image of the goal."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(goal.x.to(device))
            logits = getattr(out, "logits", out).float()
            return logits.softmax(1).cpu().gather(1, goal.y_wanted.cpu()[:, None])[:, 0]
    finally:
        model.train(was_training)


def penultimate(model: nn.Module) -> Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b d"]]:
    """The function from pixels to what enters the model's last linear layer; differentiable.

    Uses ``model.features`` where there is one, else listens at the last ``nn.Linear``.

    Raises:
        ValueError: the model has neither.
    """
    features = getattr(model, "features", None)
    if callable(features) and not isinstance(features, nn.Module):
        return cast("Callable[[Tensor], Tensor]", features)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer, so no penultimate features")

    def listen(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        heard: list[Tensor] = []
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        try:
            model(x)
        finally:
            hook.remove()
        return heard[-1]

    return listen
