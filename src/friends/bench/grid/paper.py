"""The numbers that the FRIENDS paper prints in its Tables 1 to 7, by the rows of the built-in grids.

Numbers are percent, as printed. What stands behind a plus-minus sign differs from row to row, and some numbers do not
fit others of the paper: each row says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VARIANCE = "p (1 - p) / sqrt(20), which is no standard error; 0.25 / sqrt(20) where all trials agree"
BINOMIAL = "the standard error sqrt(p (1 - p) / 24)"
EMPIRICAL = "the spread of runs that the paper does not describe"
TRIALS = {"table1": 20, "table2": 24, "table4": 20, "table5": 24, "table6": 20, "table7": 20}
"""Over how many poisoned data sets a table averages, where the paper says so."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = 50_000
"""Of CIFAR-10, on which all of its tables are."""
EXTRA = {"table2": ("mixup", "cutmix", "maxup")}
"""Rows of the built-in grids, paper preset, that the paper's tables do not have; nor do they have ``clean``."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row, or half a row, of a table of the paper.

    Args:
        table: name of our grid.
        labels: the place on its axes.
        defense: our name for the row.
        name: the paper's name for it.
        success: of the attack, percent.
        accuracy: on clean test images, percent.
        success_spread, accuracy_spread: what follows the plus-minus sign, percentage points; none where nothing is
            printed.
        spread: what ``success_spread`` is. What ``accuracy_spread`` is, the paper does not say.
        minutes: of training, on the paper's machine (one NVIDIA A40).
        doubts: what does not fit other numbers of the paper, or is not said.
    """

    table: str
    labels: Mapping[str, str]
    defense: str
    name: str
    success: float
    accuracy: float
    success_spread: float | None = None
    accuracy_spread: float | None = None
    spread: str = ""
    minutes: int | None = None
    doubts: tuple[str, ...] = ()


Numbers = tuple[str, str, float, float | None, float, float | None]
_ELSEWHERE = "the table has no undefended row; these are the undefended numbers of Table 4, for the same attack"
_COPIED = "the spread is no formula's: most likely taken from the attack's own paper, so of other models"
_ABOVE = "more accurate than the undefended row, so probably of another model"
_MIXED = "the text gives STRIP's success rate with Neural Cleanse's accuracy"
_SWAPPED = "the text swaps by how much FRIENDS does better than EPIC-0.1 (2.41 points) and Spectral Signatures (14.18)"
_OTHERS = "the spread fits no formula of FRIENDS' rows"
_LONGER = "not the 40 epochs of Table 2, where the same attack has 83.48 and 21.52 %: presumably 80"
_WITH = "trained with augmentation, the undefended model without: what helps is not separated"
_DOUBTS = {
    ("table1", "undefended"): (_ELSEWHERE,),
    ("table6", "undefended"): (_ELSEWHERE,),
    ("table7", "undefended"): (_ELSEWHERE,),
    ("table2", "spectral-signatures"): (_COPIED, _SWAPPED),
    ("table2", "activation-clustering"): (_COPIED,),
    ("table2", "dp-sgd"): (_COPIED,),
    ("table2", "dp-instahide"): (_COPIED, "which augmentations are meant is not said"),
    ("table2", "strip"): (_COPIED, _ABOVE, _MIXED),
    ("table2", "neural-cleanse"): (_COPIED, _ABOVE, _MIXED),
    ("table2", "abl"): (_COPIED, "trained for 85 epochs"),
    ("table2", "epic-0.1"): (_OTHERS, _SWAPPED),
    ("table2", "epic-0.2"): (_OTHERS, "the lowest success of the table, though FRIENDS is bold"),
    ("metapoison", "undefended"): ("trained without augmentation",),
    ("metapoison", "friends-b"): (_WITH,),
    ("sleeper-agent", "undefended"): (_LONGER,),
    ("sleeper-agent", "friends-b"): (_LONGER,),
}

# Our row, the paper's name, success and its spread, accuracy and its spread.
_TABLE1: tuple[Numbers, ...] = (
    ("undefended", "None", 75.00, None, 93.50, None),
    ("ap-0.25", "AP-0.25", 15.00, 2.85, 93.27, 0.00),
    ("ap-0.5", "AP-0.5", 10.00, 2.01, 92.83, 0.00),
    ("ap-0.75", "AP-0.75", 0.00, 5.59, 91.29, 0.00),
    ("deep-knn", "DeepKNN", 75.00, 4.19, 93.72, 0.24),
    ("adversarial-training", "Adversarial Training", 60.00, 5.37, 92.03, 0.31),
    ("activation-clustering", "Activation Clustering", 45.00, 5.53, 87.69, 0.50),
    ("dp-sgd", "Diff. Priv. SGD", 5.00, 1.06, 75.70, 1.19),
    ("epic-0.1", "EPIC-0.1", 0.00, 5.59, 90.04, 0.22),
    ("friendly-noise", "Friendly Noise", 10.00, 2.01, 91.73, 0.30),
    ("friends-u", "FRIENDS-U", 5.00, 1.06, 91.91, 0.28),
    ("friends-b", "FRIENDS-B", 0.00, 5.59, 91.52, 0.28),
    ("friends-g", "FRIENDS-G", 0.00, 5.59, 91.50, 0.25),
)
_MINUTES = {
    "ap-0.25": 159,
    "ap-0.5": 221,
    "ap-0.75": 270,
    "deep-knn": 175,
    "adversarial-training": 157,
    "activation-clustering": 61,
    "dp-sgd": 38,
    "epic-0.1": 48,
    "friendly-noise": 37,
    "friends-u": 37,
    "friends-b": 37,
    "friends-g": 37,
}
_TABLE2: tuple[Numbers, ...] = (
    ("undefended", "None", 83.48, 7.58, 91.56, 0.19),
    ("spectral-signatures", "Spectral Signatures", 37.17, 10.10, 89.94, 0.19),
    ("activation-clustering", "Activation Clustering", 15.17, 5.38, 72.38, 0.48),
    ("dp-sgd", "Diff. Priv. SGD", 13.14, 4.49, 70.00, 0.17),
    ("dp-instahide", "Strong Augmentation", 69.75, 10.77, 91.32, 0.12),
    ("strip", "STRIP", 62.68, 4.90, 92.23, 0.05),
    ("neural-cleanse", "NeuralCleanse", 85.11, 5.04, 92.26, 0.06),
    ("abl", "ABL", 67.21, 10.52, 81.33, 3.21),
    ("epic-0.1", "EPIC-0.1", 23.93, 3.48, 89.56, 0.14),
    ("epic-0.2", "EPIC-0.2", 9.10, 1.57, 86.21, 0.14),
    ("friends-b", "FRIENDS-B", 21.52, 8.39, 89.76, 0.30),
    ("friends-g", "FRIENDS-G", 22.99, 8.59, 89.87, 0.31),
    ("friends-u", "FRIENDS-U", 34.53, 9.71, 90.36, 0.38),
)
# Our label on the axis "attack", the paper's name; undefended: success and accuracy; FRIENDS-B: success and accuracy.
_TABLE3 = (
    ("gradient-matching-8", "Gradient Matching (xi = 8)", 50.00, 93.55, 0.00, 91.55),
    ("gradient-matching-16", "Gradient Matching (xi = 16)", 75.00, 93.50, 0.00, 91.52),
    ("metapoison", "Metapoison (xi = 8)", 45.00, 87.61, 20.00, 90.82),
    ("bullseye-polytope", "Bullseye Polytope", 100.00, 92.13, 35.00, 79.35),
    ("poison-frogs", "Poison Frogs", 100.00, 92.12, 30.00, 79.07),
    ("sleeper-agent", "Sleeper Agent", 91.72, 93.36, 31.20, 91.31),
)
_TABLE4: tuple[Numbers, ...] = (
    ("undefended", "No Def.", 75.00, None, 93.50, None),
    ("friendly-noise", "Friendly Noise", 10.00, None, 91.73, None),
    ("noise-gaussian", "Noise Only, Gaussian", 0.00, None, 89.46, None),
    ("noise-bernoulli", "Noise Only, Bernoulli", 5.00, None, 89.31, None),
    ("noise-uniform", "Noise Only, Uniform", 0.00, None, 91.61, None),
    ("friends-g", "FRIENDS, Gaussian", 0.00, None, 91.50, None),
    ("friends-b", "FRIENDS, Bernoulli", 0.00, None, 91.52, None),
    ("friends-u", "FRIENDS, Uniform", 5.00, None, 91.91, None),
)
# As Table 3, with what the attacker adapts to, and spreads.
_TABLE5 = (
    ("sleeper-agent", "None", 83.48, 7.58, 91.56, 0.19, 21.52, 8.39, 89.76, 0.30),
    ("sleeper-agent-bernoulli", "Bernoulli Noise", 80.25, 8.13, 91.46, 0.27, 31.05, 9.45, 89.69, 0.33),
    ("sleeper-agent-friends-b", "FRIENDS-B", 79.08, 8.30, 91.62, 0.38, 30.50, 9.40, 88.42, 0.39),
)
_TABLE6: tuple[Numbers, ...] = (
    ("undefended", "None", 75.00, None, 93.50, None),
    ("friends-b", "FRIENDS-B (ResNet18)", 0.00, None, 91.52, None),
    ("friends-b-alexnet", "FRIENDS-B (AlexNet -> ResNet18)", 0.00, None, 91.27, None),
    ("friends-b-lenet", "FRIENDS-B (LeNet -> ResNet18)", 0.00, None, 91.39, None),
)
_TABLE7: tuple[Numbers, ...] = (
    ("undefended", "None", 75.00, None, 93.50, None),
    ("friends-b-l2", "L2", 0.00, None, 91.52, None),
    ("friends-b-l1", "L1", 0.00, None, 91.50, None),
    ("friends-b-linf", "Linf", 0.00, None, 91.37, None),
)


def _row(table: str, numbers: Numbers, labels: Mapping[str, str] | None = None) -> Published:
    """One published row, with what its plus-minus is and what there is to doubt."""
    defense, name, success, success_spread, accuracy, accuracy_spread = numbers
    labels = labels or {}
    if success_spread is None:
        spread = ""
    elif table == "table1":
        spread = VARIANCE
    else:
        binomial = table == "table5" or defense == "undefended" or defense.startswith("friends")
        spread = BINOMIAL if binomial else EMPIRICAL
    return Published(
        table=table,
        labels=labels,
        defense=defense,
        name=name,
        success=success,
        accuracy=accuracy,
        success_spread=success_spread,
        accuracy_spread=accuracy_spread,
        spread=spread,
        minutes=_MINUTES.get(defense) if table == "table1" else None,
        doubts=_DOUBTS.get((labels["attack"] if table == "table3" else table, defense), ()),
    )


def _rows() -> tuple[Published, ...]:
    simple = {"table1": _TABLE1, "table2": _TABLE2, "table4": _TABLE4, "table6": _TABLE6, "table7": _TABLE7}
    found = [_row(table, numbers) for table, rows in simple.items() for numbers in rows]
    for attack, name, p0, a0, p1, a1 in _TABLE3:
        place = {"attack": attack}
        found.append(_row("table3", ("undefended", f"{name}, undefended", p0, None, a0, None), place))
        found.append(_row("table3", ("friends-b", f"{name}, FRIENDS-B", p1, None, a1, None), place))
    for attack, name, p0, sp0, a0, sa0, p1, sp1, a1, sa1 in _TABLE5:
        place = {"attack": attack}
        found.append(_row("table5", ("undefended", f"adapted to: {name}, undefended", p0, sp0, a0, sa0), place))
        found.append(_row("table5", ("friends-b", f"adapted to: {name}, FRIENDS-B", p1, sp1, a1, sa1), place))
    return tuple(found)


PUBLISHED = _rows()
"""All rows of Tables 1 to 7."""


def published(table: str, labels: Mapping[str, str], defense: str) -> Published | None:
    """What the paper prints for a row of one of our grids; none where it has no such row."""
    found = (row for row in PUBLISHED if row.table == table and row.defense == defense and row.labels == dict(labels))
    return next(found, None)
