"""What a finding about the loss is turned into: the culprit, and what to type instead."""

from __future__ import annotations

import pytest

from gradaccum.auditing.loss_shares import SAMPLES, LossFinding
from gradaccum.auditing.suspects import _loss


@pytest.mark.parametrize(
    ("finding", "kind", "remedy"),
    [
        (LossFinding(is_coupled=False, over="tokens", instead="return x", taken=SAMPLES), "loss-weight", "return x"),
        (LossFinding(is_coupled=True, shares=(0.4, 0.7)), "coupled-loss", 'combine="sum"'),
        (LossFinding(is_coupled=True, residual=0.3), "coupled-loss", "forward=forward, batch_loss=batch_loss)"),
    ],
)
def test_a_loss(finding: LossFinding, kind: str, remedy: str) -> None:
    [culprit] = _loss(finding, 0.1)
    assert (culprit.kind, culprit.where) == (kind, "the loss")
    assert remedy in culprit.remedy
