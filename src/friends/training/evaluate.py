"""The judge. Attacks and defenses never compute their own success: this module does, once, for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor, nn

from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.modules import logits_of
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


@dataclass(frozen=True)
class Removal:
    """What a defense removed from the training data, against what was poison. Only the judge knows the latter.

    Args:
        removed: rows removed.
        caught: poisons among them.
        poisons: poisons there were.
    """

    removed: int
    caught: int
    poisons: int

    @property
    def precision(self) -> float:
        """Poisons among the removed rows; 0 if none was removed."""
        return self.caught / self.removed if self.removed else 0.0

    @property
    def recall(self) -> float:
        """Removed rows among the poisons; 0 if there is none."""
        return self.caught / self.poisons if self.poisons else 0.0


def removal(removed: Bool[Tensor, " n"], poison_idx: Int64[Tensor, " p"]) -> Removal:
    """Compare the rows that a defense removed (``Fitted.removed``) with those that are poison."""
    caught = int(removed.cpu()[poison_idx.cpu()].sum())
    return Removal(int(removed.sum()), caught, len(poison_idx))


def predict(predictor: Predictor, x: Tensor, *, batch: int = BATCH) -> Int64[Tensor, " n"]:
    """Predictions, on the CPU, for bytes or pixels ``(n, c, h, w)``, batch by batch."""
    parts = [predictor(part.float() / 255 if part.dtype == torch.uint8 else part).cpu() for part in x.split(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def probabilities(
    model: nn.Module, x: UInt8[Tensor, "n c h w"], *, device: torch.device | str = "cpu", batch: int = BATCH
) -> Float64[Tensor, "n k"]:
    """What a model says of images, as softmax probabilities in float64 on the CPU; in eval mode, batch by batch.

    Args:
        model: takes pixels in [0, 1] on ``device`` and returns logits.
        x: at least one image.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [logits_of(model, part.to(device).float() / 255).cpu() for part in x.split(batch)]
    finally:
        model.train(was_training)
    return torch.cat(parts).double().softmax(1)


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
    return verdict(predictor, goal, device)[0]


def verdict(
    predictor: Predictor, goal: Goal, device: torch.device | str = "cpu"
) -> tuple[Bool[Tensor, " m"], Bool[Tensor, " m"]]:
    """For each image of the goal, whether the attack succeeds (as :func:`success` says), and whether it is refused."""
    answer = predict(predictor, goal.x.to(device))
    return answer == goal.y_wanted.cpu(), answer == ABSTAIN


def confidence(model: nn.Module, goal: Goal, device: torch.device | str = "cpu") -> Float[Tensor, " m"]:
    """The softmax probability that the model gives to the class that the attacker wants, per image of the goal."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return (
                logits_of(model, goal.x.to(device))
                .float()
                .softmax(1)
                .cpu()
                .gather(1, goal.y_wanted.cpu()[:, None])[:, 0]
            )
    finally:
        model.train(was_training)
