"""What a tuning found, in words, as JSON, and as Markdown: intervals, the verdict, and how to use the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from friends.bench.provenance import commit, versions
from friends.bench.statistics import clopper_pearson, difference_interval, mean_interval
from friends.bench.trial import plain_value
from friends.bench.tuning_grid import Candidate, noise_epoch
from friends.bench.tuning_search import Round, Score
from friends.bench.tuning_settings import Tuned
from friends.data.files import write_json, write_text

NAME = "tuning.json"
TEXT = "tuning.md"


def interval(rates: Sequence[float], images: Sequence[int], level: float = 0.95) -> tuple[float, float]:
    """An interval for the mean of the rates of some trainings, each judged on so many images.

    The hull of two: Student's t over the trainings, where there are two or more, which covers seeds and goals; and
    Clopper-Pearson over all images, which keeps equal rates from looking certain. A single training has the latter
    alone, and says nothing of other seeds.
    """
    hits = round(sum(rate * n for rate, n in zip(rates, images, strict=True)))
    low, high = clopper_pearson(hits, sum(images), level)
    if len(rates) > 1:
        spread = mean_interval(rates, level)
        low, high = min(low, spread[0]), max(high, spread[1])
    return max(0.0, low), min(1.0, high)


def accuracy_of(score: Score) -> str:
    """Accuracy as reports print it: mean and interval."""
    return _printed(score.accuracy, [score.images] * len(score.accuracy))


def success_of(score: Score) -> str:
    """The attack's success as reports print it: mean and interval."""
    return "diverged" if score.diverged else _printed(score.success, score.shown)


def _printed(rates: Sequence[float], images: Sequence[int]) -> str:
    low, high = interval(rates, images)
    return f"{100 * sum(rates) / len(rates):.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def verdict(found: Tuned) -> list[str]:
    """What the numbers say and what they do not, a sentence or two each."""
    if found.judged is None:
        return ["Time ran out before any settings were judged: give more minutes; what is finished is kept."]
    said = [_progress(found), _of_attack(found), _of_choice(found)]
    return [sentence for sentence in said if sentence]


def _progress(found: Tuned) -> str:
    if not found.out_of_time:
        return ""
    rounds, judged = found.rounds, found.judged
    assert judged is not None
    at = f"{rounds.index(judged) + 1} of {found.settings.rungs}"
    left = sum(len(r.unfinished) for r in rounds)
    unfinished = f" {left} candidate{'s' if left != 1 else ''} unfinished." if left else ""
    return (
        f"Time ran out: this is the best so far, from rung {at} ({heading(judged)}).{unfinished} "
        "The same command goes on."
    )


def _of_attack(found: Tuned) -> str:
    judged = found.judged
    assert judged is not None and judged.undefended is not None and judged.clean is not None
    undefended, clean = (f"{100 * score.mean_success:.0f} %" for score in (judged.undefended, judged.clean))
    rates = f"{undefended} undefended, {clean} with clean data"
    if judged.works:
        return f"The attack works without a defense: {found.mock}; success {rates}."
    return (
        f"The built-in attack does not succeed on these data without a defense ({rates}; the strongest tried: "
        f"{found.mock}). So nothing here shows that any settings protect: they are ranked by accuracy alone."
    )


def _of_choice(found: Tuned) -> str:
    judged, chosen = found.judged, found.chosen
    assert judged is not None and judged.undefended is not None
    drop = f"{100 * found.settings.accuracy_drop:g} points"
    if chosen is None:
        nearest = max(judged.scores, key=lambda c: judged.scores[c].mean_accuracy)
        cost = judged.undefended.mean_accuracy - judged.scores[nearest].mean_accuracy
        return (
            f"No candidate keeps the accuracy within {drop} of undefended. The nearest costs {100 * cost:.1f}: "
            f"{nearest}. Try weaker strengths (--zeta, --mu), longer training, or a larger --accuracy-drop."
        )
    if not judged.works:
        return f"Most accurate, with no claim of protection: {chosen}."
    shown, text = protection(found)
    name = "Recommended" if shown else "Best found, but not shown to protect"
    return f"{name}, the least success within {drop} of the undefended accuracy: {chosen}. {text}"


def protection(found: Tuned) -> tuple[bool, str]:
    """Whether the chosen settings lower the attack's success by more than chance could, and what says so.

    With new seeds and goals, if they were trained with such; else on those that they were chosen on.
    """
    chosen, judged = found.chosen, found.confirmed or found.judged
    assert judged is not None and chosen is not None and judged.undefended is not None
    where = "With new seeds and goals" if found.confirmed else "On the goals that it was chosen on, which flatters it,"
    if not judged.works:
        return False, f"{where} the attack does not work undefended."
    before, after = judged.undefended, judged.scores[chosen]
    accuracies = [100 * score.mean_accuracy for score in (before, after)]
    beyond = ", which is more than it may cost" if accuracies[0] - accuracies[1] > _allowed(found) else ""
    change = f"{where} accuracy goes from {accuracies[0]:.1f} % to {accuracies[1]:.1f} %{beyond}; success goes "
    change += f"from {100 * before.mean_success:.0f} % to {100 * after.mean_success:.0f} %"
    if len(before.success) < 2:
        return False, f"{change} in one training each, which says nothing of others: --seeds 3 or more would."
    low, high = (100 * value for value in difference_interval(after.success, before.success))
    fall = 100 * (before.mean_success - after.mean_success)
    word, least, most = ("fall", low, high) if fall >= 0 else ("rise", -high, -low)
    change += f", a {word} of {abs(fall):.0f} points ({round(least)} to {round(most)})"
    return low > 0, change + ("." if low > 0 else ": chance could do that." if fall >= 0 else ".")


def _allowed(found: Tuned) -> float:
    """How many points of accuracy the defense may cost."""
    return 100 * found.settings.accuracy_drop + 1e-9


def python_line(candidate: Candidate, epochs: int) -> str:
    """The defense as a line of Python, for a training of so many epochs."""
    parts = [f"zeta={candidate.zeta} / 255" if candidate.zeta else "zeta=0"]
    parts.append(f"mu={candidate.mu} / 255" if candidate.mu else "mu=0")
    if candidate.mu:
        parts.append(f'random="{candidate.random}"')
    if candidate.zeta:
        parts.append(f"def_epoch={noise_epoch(epochs)}")
        parts.append(f"settings=FriendlySettings(lr={candidate.lr:g}, penalty={candidate.penalty:g})")
    return f"Friends({', '.join(parts)})"


def toml_arm(candidate: Candidate, epochs: int) -> str:
    """The defense as an arm of a trial file."""
    lines = ["[[arms]]", 'name = "tuned"', "  [[arms.defenses]]", '  name = "friends"']
    lines.append(f'  zeta = "{candidate.zeta}/255"' if candidate.zeta else "  zeta = 0")
    lines.append(f'  mu = "{candidate.mu}/255"' if candidate.mu else "  mu = 0")
    if candidate.mu:
        lines.append(f'  random = "{candidate.random}"')
    if candidate.zeta:
        lines.append(f"  def_epoch = {noise_epoch(epochs)}")
        settings = f'base = "released", lr = {candidate.lr:g}, penalty = {candidate.penalty:g}'
        lines.append(f"  settings = {{ {settings} }}")
    return "\n".join(lines)


def rows_of(judged: Round, chosen: Candidate | None = None) -> list[tuple[str, str, str, str]]:
    """The lines of a trade-off table: what, accuracy, success, and a mark for the front and for the choice."""
    rows: list[tuple[str, str, str, str]] = []
    for name, score in (("undefended", judged.undefended), ("clean data", judged.clean)):
        if score is not None:
            rows.append((name, accuracy_of(score), success_of(score), ""))
    for candidate, score in sorted(judged.scores.items(), key=lambda item: -item[1].mean_accuracy):
        mark = "front" if candidate in judged.front else ""
        mark = f"{mark}, chosen".removeprefix(", ") if candidate == chosen else mark
        rows.append((str(candidate), accuracy_of(score), success_of(score), mark))
    return rows


def heading(judged: Round) -> str:
    """How dearly a round was judged."""
    rung = judged.rung
    each = "training" if rung.repeats == 1 else "trainings"
    return f"{rung.images} images, {rung.epochs} epochs, {rung.repeats} {each} each"


def plain(found: Tuned) -> dict[str, Any]:
    """Everything that was found, as plain JSON values."""
    epochs = found.settings.recipe.epochs
    chosen = found.chosen
    return {
        "settings": plain_value(found.settings),
        "data": dict(found.data),
        "attacks tried": [
            {
                "attack": str(tried.mock),
                "undefended": _score(tried.undefended),
                "clean": _score(tried.clean),
                "works": tried.works,
            }
            for tried in found.tried
        ],
        "attack": None if found.mock is None else str(found.mock),
        "rounds": [_round(one) for one in found.rounds],
        "judged": None if found.judged is None else found.rounds.index(found.judged),
        "chosen": None if chosen is None else plain_value(chosen),
        "python": None if chosen is None else python_line(chosen, epochs),
        "toml": None if chosen is None else toml_arm(chosen, epochs),
        "confirmed": None if found.confirmed is None else _round(found.confirmed),
        "out of time": found.out_of_time,
        "verdict": verdict(found),
        "versions": versions(),
        "commit": commit(),
    }


def _round(one: Round) -> dict[str, Any]:
    return {
        "rung": plain_value(one.rung),
        "attack works": one.works,
        "undefended": None if one.undefended is None else _score(one.undefended),
        "clean": None if one.clean is None else _score(one.clean),
        "candidates": [
            {"candidate": plain_value(c), "front": c in one.front, **_score(score)} for c, score in one.scores.items()
        ],
        "unfinished": [plain_value(candidate) for candidate in one.unfinished],
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        "accuracy": list(score.accuracy),
        "accuracy interval": list(interval(score.accuracy, [score.images] * len(score.accuracy))),
        "success": list(score.success),
        "success interval": list(interval(score.success, score.shown)),
        "images": score.images,
        "shown": list(score.shown),
        "seconds": round(score.seconds, 3),
        "diverged": score.diverged,
    }


def markdown(found: Tuned) -> str:
    """The same for people."""
    data = found.data
    lines = [f"# Settings of FRIENDS for {data['name']}", ""]
    lines.append(f"{data['train']} training images, {data['held out']} held out; the test set was not looked at.")
    lines += ["", *(f"{sentence}\n" for sentence in verdict(found))]
    if found.judged is not None:
        lines += _section(found.judged, found.chosen, "Trade-off")
    if found.confirmed is not None:
        lines += _section(found.confirmed, found.chosen, "With new seeds and goals")
    if found.chosen is not None:
        epochs = found.settings.recipe.epochs
        lines += ["## Use", "", "```python", python_line(found.chosen, epochs), "```", ""]
        lines += ["```toml", toml_arm(found.chosen, epochs), "```", ""]
    for k, one in enumerate(found.rounds):
        if one is not found.judged:
            lines += _section(one, None, f"Rung {k + 1}")
    return "\n".join(lines).rstrip() + "\n"


def _section(one: Round, chosen: Candidate | None, title: str) -> list[str]:
    lines = [f"## {title}", "", f"{heading(one)}; means with 95 % intervals.", ""]
    lines += ["| settings | accuracy | attack's success | |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows_of(one, chosen)]
    lines += [f"| {candidate} | unfinished | unfinished | |" for candidate in one.unfinished]
    return [*lines, ""]


def write(found: Tuned, out: Path) -> None:
    """Write ``tuning.json`` and ``tuning.md``, each whole or not at all."""
    write_text(out / TEXT, markdown(found))
    write_json(out / NAME, plain(found))
