"""The page of a training: how good the model is, class by class, how far its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from friends.bench.charts import Axis, Line, epoch_axis, interval_bar, line_chart, percent_axis
from friends.bench.report import duration, facts, percent
from friends.bench.templates import template
from friends.data.files import write_text

FEW = 100
"""Below this many images, a page says that they are few."""
MATRIX = 25
"""More classes than this have no matrix on the page, only the commonest confusions."""
CONFUSIONS = 10
LISTED = 50
WHOLE = Axis(0, 1, ((0, "0"), (0.5, "50\u202f%"), (1, "100\u202f%")), "")

Found = Mapping[str, Any]
"""What is in ``metrics.json``."""


@dataclass(frozen=True)
class Row:
    """One class as text, with a bar for its recall."""

    name: str
    images: str
    precision: str
    recall: str
    f1: str
    bar: Markup | None


def render(found: Found, path: Path) -> Path:
    """Write the page, self-contained, atomically. Returns ``path``."""
    data, measures = found["data"], found["measures"]
    low, high = measures["interval"]
    interval = f"{100 * low:.1f}–{100 * high:.1f}\u202f%"
    page = template("training.html.jinja").render(
        found=found,
        name=data["name"],
        headline=headline(found),
        summary=summary(found),
        caveats=caveats(found),
        accuracy=percent(measures["accuracy"]),
        interval=interval,
        accuracy_bar=interval_bar(measures["accuracy"], low, high, "arm-2", f"accuracy, 95 % interval {interval}"),
        ece=percent(measures["ece"]),
        loss=f"{measures['loss']:.3f}",
        worst=worst(measures["classes"]),
        rows=rows(measures["classes"]),
        matrix=measures["confusion"] if len(measures["confusion"]) <= MATRIX else None,
        confusions=confusions(measures["confusion"], data["classes"]),
        calibration=calibration_chart(measures["bins"]),
        bins=[_bin(one) for one in measures["bins"]],
        curves=curves(found["history"]),
        skipped=found["skipped"][:LISTED],
        sections=_sections(found),
    )
    # a lone surrogate is legal in JSON, but no file can hold it
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def headline(found: Found) -> str:
    """What came out, in one sentence."""
    measures = found["measures"]
    how = "Trained with FRIENDS" if found["defended"] else "Trained without a defense"
    return (
        f"{how}, the model is right on {measures['right']:,} of {measures['images']:,} images that it was not "
        "trained on."
    )


def summary(found: Found) -> str:
    """The sentences under the headline: how far its probabilities can be believed, and what it cost."""
    measures = found["measures"]
    mean = sum(one["answers"] * one["confidence"] for one in measures["bins"]) / measures["images"]
    gap = mean - measures["accuracy"]
    word = "as sure as it is right" if abs(gap) < 0.01 else "too sure of itself" if gap > 0 else "not sure enough"
    return (
        f"On average it gives its answers a probability of {percent(mean)}: it is {word}. Training took "
        f"{duration(found['seconds'])}."
    )


def caveats(found: Found) -> list[str]:
    """What a reader must know before believing the numbers."""
    data, measures = found["data"], found["measures"]
    said: list[str] = []
    if found["defended"]:
        said.append(
            "Accuracy says nothing of protection. What the defense stops on data like these, friends tune and friends "
            "run can measure."
        )
    else:
        said.append("No defense was in force: this model is for comparison.")
    if measures["images"] < FEW:
        said.append(f"Few images: with {measures['images']}, every one of them moves the accuracy a lot.")
    if data["skipped"]:
        count, one = f"{data['skipped']:,}", data["skipped"] == 1
        which = (
            "image file could not be read and was left out"
            if one
            else "image files could not be read and were left out"
        )
        said.append(f"{count} {which}; see below.")
    unseen = [one["name"] for one in measures["classes"] if not one["images"]]
    if unseen:
        said.append(f"No image to judge on: {_some(unseen)}.")
    never = [one["name"] for one in measures["classes"] if not one["answers"] and one["images"]]
    if never:
        said.append(f"Never the answer: {_some(never)}.")
    said.append(
        "The images judged on are from the same source as the training images: if that is poisoned, so may they be."
    )
    return said


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def worst(classes: Sequence[Found]) -> tuple[str, str] | None:
    """The class that is recognised least, and how often it is."""
    judged = [one for one in classes if one["recall"] is not None]
    least = min(judged, key=lambda one: one["recall"], default=None)
    return None if least is None else (least["name"], percent(least["recall"]))


def rows(classes: Sequence[Found]) -> list[Row]:
    """The table of classes."""
    return [
        Row(
            name=one["name"],
            images=f"{one['images']:,}",
            precision=_share(one["precision"]),
            recall=_share(one["recall"]),
            f1=_share(one["f1"]),
            bar=None if one["recall"] is None else _recall_bar(one),
        )
        for one in classes
    ]


def _recall_bar(one: Found) -> Markup:
    from friends.bench.statistics import wilson

    low, high = wilson(round(one["recall"] * one["images"]), one["images"])
    return interval_bar(one["recall"], low, high, "arm-2", f"recall, 95 % interval {percent(low)} to {percent(high)}")


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def confusions(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> list[tuple[str, str, int, str]]:
    """The commonest mistakes: the true class, the answer, how often, and of how many of that class."""
    found = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
    found.sort(key=lambda one: (-one[0], one[1], one[2]))
    return [(classes[i], classes[j], count, percent(count / sum(matrix[i]))) for count, i, j in found[:CONFUSIONS]]


def calibration_chart(bins: Sequence[Found]) -> Markup:
    """Share of right answers over probability; a model that can be believed lies on the diagonal."""
    points = tuple((one["confidence"], one["accuracy"]) for one in bins)
    ends = f"from {percent(points[0][1])} right at {percent(points[0][0])}" if points else ""
    x, y = (Axis(WHOLE.low, WHOLE.high, WHOLE.ticks, title) for title in ("probability of the answer", "right"))
    diagonal = Line(((0.0, 0.0), (1.0, 1.0)), "arm-1")
    dots = [Line((point,), "arm-2") for point in points]
    return line_chart([diagonal, Line(points, "arm-2"), *dots], x, y, f"share of right answers by probability, {ends}")


def _bin(one: Found) -> tuple[str, str, str, str]:
    between = f"{100 * one['low']:.0f}–{100 * one['high']:.0f}\u202f%"
    return between, f"{one['answers']:,}", percent(one["confidence"]), percent(one["accuracy"])


def curves(history: Sequence[Mapping[str, float]]) -> list[tuple[str, Markup]]:
    """Accuracy on what is held out and the loss of the training, over the epochs."""
    x = epoch_axis(history[-1]["epoch"])
    right = tuple((line["epoch"], line["held-out accuracy"]) for line in history)
    values = [value for _, value in right]
    alt = f"accuracy on held-out images goes from {percent(values[0])} to {percent(values[-1])}"
    accuracy = line_chart([Line(right, "arm-2")], x, percent_axis(max(values), "", low=min(values)), alt)
    lost = tuple((line["epoch"], line["loss"]) for line in history)
    top = max(value for _, value in lost)
    y = Axis(0, top, ((0, "0"), (top / 2, f"{top / 2:.2g}"), (top, f"{top:.2g}")), "")
    loss = line_chart([Line(lost, "arm-0")], x, y, f"training loss goes from {lost[0][1]:.3g} to {lost[-1][1]:.3g}")
    return [("Accuracy on held-out images", accuracy), ("Loss of the training, noise included", loss)]


def _sections(found: Found) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that was set or measured, as titled lists of names and values."""
    data = {name: value for name, value in found["data"].items() if name != "classes"}
    for name in ("train fingerprint", "held out fingerprint"):
        data[name] = data[name][:16]
    run = {name: found[name] for name in ("finished", "device", "threads", "parameters")}
    return [
        ("Data", facts({**data, "classes": len(found["data"]["classes"])})),
        ("Run", facts({**run, "training": duration(found["seconds"]), "commit": found["commit"] or "not a checkout"})),
        ("Versions", facts(found["versions"])),
        ("All settings", facts(found["settings"])),
    ]
