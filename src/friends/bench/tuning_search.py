"""Successive halving over settings of FRIENDS with two aims: a high accuracy, and a low success of an attack.

Many candidates are judged cheaply; those on the Pareto front go on to a dearer judgement, joined by finer settings
around the best of them; and so on. Nothing here trains anything: who judges is a function.

Kevin Jamieson, Ameet Talwalkar: *Non-stochastic Best Arm Identification and Hyperparameter Optimization*, AISTATS
2016, arXiv 1502.07943. Ours are the two aims, and the finer candidates that enter at a later rung.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from friends.bench.tuning_grid import Candidate, Row, Rung, around

WORKS = 0.25
"""An attack works if it takes this much more of the images, undefended, than a model of clean data gives away."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What came out for one candidate at one rung.

    Args:
        accuracy: of each training, on the clean images that were held out.
        success: of each training, the share of the attacker's images that it has put in the wanted class.
        images: how many images were held out; ``shown``, how many the attacker has, in each training.
        seconds: training time in all.
        diverged: whether a training broke down; it counts as lost on both aims.
    """

    accuracy: tuple[float, ...]
    success: tuple[float, ...]
    images: int
    shown: tuple[int, ...]
    seconds: float = 0.0
    diverged: bool = False

    @property
    def mean_accuracy(self) -> float:
        """The mean over the trainings."""
        return sum(self.accuracy) / len(self.accuracy)

    @property
    def mean_success(self) -> float:
        """The mean over the trainings."""
        return sum(self.success) / len(self.success)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One rung, judged.

    Args:
        rung: how dearly.
        undefended, clean: the two rows that candidates are compared with; None if time ran out before.
        scores: of the finished candidates, the best first.
        front: those of them that no other beats on one aim without losing on the other.
        unfinished: candidates for which there was no time.
    """

    rung: Rung
    undefended: Score | None
    clean: Score | None
    scores: dict[Candidate, Score]
    front: tuple[Candidate, ...]
    unfinished: tuple[Candidate, ...] = ()

    @property
    def works(self) -> bool:
        """Whether the attack succeeds where there is no defense, so that its failure says something of one."""
        return works(self.undefended, self.clean)


class OutOfTimeError(Exception):
    """The time that was given is over; whoever judges raises it, and what is finished is kept."""


Judge = Callable[[Row, Rung], Score]


def works(undefended: Score | None, clean: Score | None) -> bool:
    """Whether an attack takes at least :data:`WORKS` more of its images from undefended models than from clean ones."""
    return undefended is not None and clean is not None and undefended.mean_success - clean.mean_success >= WORKS


def halve(
    first: Sequence[Candidate], rungs: Sequence[Rung], judge: Judge, *, drop: float, refine: bool = True
) -> list[Round]:
    """Judge the candidates of the first rung, then ever fewer, ever more dearly.

    Args:
        first: candidates of the first rung.
        rungs: from the cheapest to the dearest.
        judge: judges a row at a rung; raises :class:`OutOfTimeError` when it is time to stop.
        drop: how much accuracy the defense may cost; what costs much more is not worth a place.
        refine: whether a third of the places from the second rung on goes to finer settings around the best.

    Returns:
        One round for every rung that was begun.

    Raises:
        ValueError: there is no candidate or no rung.
    """
    if not first or not rungs:
        raise ValueError(f"at least one candidate and one rung are needed, not {len(first)} and {len(rungs)}")
    field, seen, rounds = list(first), set(first), list[Round]()
    for k, rung in enumerate(rungs):
        rounds.append(play(field, rung, judge, drop))
        last = rounds[-1]
        if last.unfinished or last.clean is None or k + 1 == len(rungs):
            break
        places = rungs[k + 1].candidates
        new = finer(last, places - math.ceil(places * 2 / 3), k, seen, drop) if refine else []
        field = [*list(last.scores)[: places - len(new)], *new]
        seen.update(new)
    return rounds


def play(field: Sequence[Candidate], rung: Rung, judge: Judge, drop: float) -> Round:
    """Judge a field: what it is compared with first, so that a round cut short says something."""
    compared: dict[str, Score] = {}
    scores: dict[Candidate, Score] = {}
    try:
        compared["undefended"] = judge("undefended", rung)
        compared["clean"] = judge("clean", rung)
        for candidate in field:
            scores[candidate] = judge(candidate, rung)
    except OutOfTimeError:
        pass
    undefended, clean = compared.get("undefended"), compared.get("clean")
    order, front = rank(scores, undefended, clean, drop)
    left = tuple(candidate for candidate in field if candidate not in scores)
    ranked = {candidate: scores[candidate] for candidate in order}
    return Round(rung=rung, undefended=undefended, clean=clean, scores=ranked, front=tuple(front), unfinished=left)


def rank(
    scores: dict[Candidate, Score], undefended: Score | None, clean: Score | None, drop: float
) -> tuple[list[Candidate], list[Candidate]]:
    """All candidates, the best first, and those on the first Pareto front.

    Front by front; within one, by the area that a candidate adds to what the front dominates, above an accuracy of five
    times ``drop`` below undefended. If the attack does not work, by accuracy alone.
    """
    points = {candidate: (score.mean_accuracy, score.mean_success) for candidate, score in scores.items()}
    if undefended is None or not works(undefended, clean):
        points = {candidate: (accuracy, 1.0) for candidate, (accuracy, _) in points.items()}
    floor = 0.0 if undefended is None else max(0.0, undefended.mean_accuracy - 5 * drop)
    order: list[Candidate] = []
    left, first = dict(points), list[Candidate]()
    while left:
        front = pareto(left)
        gain = areas({candidate: left[candidate] for candidate in front}, floor)
        front.sort(key=lambda c: (-gain[c], points[c][1], -points[c][0], c))
        order += front
        first = first or front
        left = {candidate: point for candidate, point in left.items() if candidate not in gain}
    return order, first


def pareto(points: dict[Candidate, tuple[float, float]]) -> list[Candidate]:
    """Those that no other beats: none has as much accuracy and as little success, and more or less of one."""

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in points.values())

    return [candidate for candidate, point in points.items() if not beaten(point)]


def areas(front: dict[Candidate, tuple[float, float]], floor: float) -> dict[Candidate, float]:
    """How much area each member of a front adds, between accuracy ``floor`` and 1 and success 1 and 0."""
    ordered = sorted(set(front.values()))  # accuracy grows, and so does success
    alone: dict[tuple[float, float], float] = {}
    for i, (accuracy, success) in enumerate(ordered):
        below = max(floor, ordered[i - 1][0]) if i else floor
        above = ordered[i + 1][1] if i + 1 < len(ordered) else 1.0
        alone[accuracy, success] = max(0.0, accuracy - below) * max(0.0, above - success)
    twins = list(front.values())
    return {candidate: alone[point] / twins.count(point) for candidate, point in front.items()}


def best(last: Round, drop: float) -> Candidate | None:
    """The least success among those within ``drop`` of the undefended accuracy; None if there is none.

    If the attack does not work, the most accurate of all.
    """
    if last.undefended is None or not last.scores:
        return None
    if not last.works:
        return max(last.scores, key=lambda c: last.scores[c].mean_accuracy)
    limit = last.undefended.mean_accuracy - drop - 1e-9
    within = [candidate for candidate, score in last.scores.items() if score.mean_accuracy >= limit]
    return min(within, key=lambda c: (last.scores[c].mean_success, -last.scores[c].mean_accuracy, c), default=None)


def finer(last: Round, count: int, level: int, seen: Iterable[Candidate], drop: float) -> list[Candidate]:
    """New candidates around the best of a round, a smaller step away on every later rung.

    Those that keep the accuracy are made stronger first, the others weaker.
    """
    known, new = set(seen), list[Candidate]()
    limit = (last.undefended.mean_accuracy if last.undefended else 0.0) - drop
    rings = [around(c, level, stronger=s.mean_accuracy >= limit) for c, s in list(last.scores.items())[: max(count, 1)]]
    for some in itertools.zip_longest(*rings):
        for candidate in some:
            if len(new) < count and candidate is not None and candidate not in known:
                known.add(candidate)
                new.append(candidate)
    return new
