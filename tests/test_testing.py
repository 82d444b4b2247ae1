"""`assert_exact` passes what is exact, and fails what is not with the report for a message."""

import pytest
from torch import nn

import zoo
from gradaccum.testing import assert_exact


def test_it_passes_and_hands_the_report_over() -> None:
    report = assert_exact(zoo.mlp(nn.Dropout(0.5)), zoo.classes, zoo.vectors(), micro_batch_size=4)
    assert report.exact
    assert report.micro_batch_sizes == (4, 3, 3, 3)


def test_it_fails_with_the_report() -> None:
    with pytest.raises(AssertionError, match=r'(?s)^Not exact: .*1. batch-norm: .*batch_norm="exact"'):
        assert_exact(zoo.mlp(nn.BatchNorm1d(8)), zoo.classes, zoo.vectors(), 4)


def test_it_takes_what_an_audit_takes() -> None:
    assert_exact(zoo.mlp(), batch=zoo.pairs(), micro_batch_size=4, forward=zoo.outputs, batch_loss=zoo.contrastive_of)
    assert_exact(zoo._TOKENS(), zoo.two_terms, zoo.sequences(), 4, weights=zoo.two_counts)


def test_it_is_short_in_a_traceback(pytester: pytest.Pytester) -> None:
    """The traceback ends in the user's own line."""
    pytester.makepyfile(
        """
        import torch
        from torch import nn
        from gradaccum.testing import assert_exact

        def test_mine():
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            assert_exact(model, lambda model, x: model(x).square().mean(), torch.randn(11, 3), 4)
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*InexactError: Not exact: *"])
    assert "def assert_exact" not in result.stdout.str()
