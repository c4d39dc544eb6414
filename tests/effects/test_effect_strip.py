"""STRIP on digits with a backdoor: it refuses what carries the trigger, and hardly anything else."""

from __future__ import annotations

import pytest
from backdoored_digits import backdoored

from friends.data.images import LabeledImages
from friends.defenses import Strip
from friends.training import ABSTAIN, accuracy, success
from friends.training.evaluate import predict


@pytest.mark.effect
@pytest.mark.parametrize("seed", [1, 2])
def test_strip_refuses_triggered_digits_and_few_others(digits: LabeledImages, seed: int) -> None:
    case = backdoored(digits, seed)
    bare, fitted = case.trained(), case.trained(Strip(frr=0.02, calibration=500))
    assert float(success(bare.predictor, case.goal).float().mean()) > 0.9
    assert float(success(fitted.predictor, case.goal).float().mean()) < 0.15
    assert float((predict(fitted.predictor, case.goal.x) == ABSTAIN).float().mean()) > 0.85
    some = case.test.rows(range(600))
    judged, before = accuracy(fitted.predictor, some), accuracy(bare.predictor, some)
    assert judged.abstained < 0.08 * judged.n  # 2 % are asked for
    assert judged.strict > before.strict - 0.08
    assert judged.selective > before.selective - 0.01
