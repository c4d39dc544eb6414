"""Precision, recall, confusions and calibration, counted one answer at a time from their definitions."""

from __future__ import annotations

import math


def confusion(answers: list[int], truth: list[int], classes: int) -> list[list[int]]:
    matrix = [[0] * classes for _ in range(classes)]
    for answer, true in zip(answers, truth, strict=True):
        matrix[true][answer] += 1
    return matrix


def precision_and_recall(matrix: list[list[int]], k: int) -> tuple[float | None, float | None]:
    said, there = sum(row[k] for row in matrix), sum(matrix[k])
    return (matrix[k][k] / said if said else None, matrix[k][k] / there if there else None)


def expected_calibration_error(
    confidences: list[float], right: list[bool], bins: int
) -> tuple[float, list[tuple[int, int, float, float]]]:
    """Guo et al. 2017: B_m holds the answers with confidence in ((m-1)/M, m/M]; ECE = sum |B_m|/n |acc - conf|."""
    n, error, table = len(confidences), 0.0, []
    for m in range(1, bins + 1):
        inside = [i for i, p in enumerate(confidences) if (m - 1) / bins < p <= m / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            error += len(inside) / n * abs(accuracy - confidence)
            table.append((m, len(inside), confidence, accuracy))
    return error, table


def negative_log_likelihood(probabilities: list[list[float]], truth: list[int]) -> float:
    return -sum(math.log(row[true]) for row, true in zip(probabilities, truth, strict=True)) / len(truth)
