"""Metrics against brute force, known truth and edge cases."""

import numpy as np
import pytest

from support import metrics


def test_auroc_and_average_precision_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 8, 40) / 8, rng.random(40) < 0.4  # many ties
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
        assert metrics.auroc(scores, labels) == pytest.approx(np.mean(pairs))
        recall, expected = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            chosen = scores >= threshold
            now = (labels & chosen).sum() / labels.sum()
            expected += (now - recall) * (labels & chosen).sum() / chosen.sum()
            recall = now
        assert metrics.average_precision(scores, labels) == pytest.approx(expected)
    assert np.isnan(metrics.auroc([0.1, 0.2], [1, 1])) and np.isnan(metrics.average_precision([0.1], [0]))


def test_auroc_within_counts_pairs_of_a_group_only():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels, groups = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.4, rng.integers(0, 4, 60)
        rows = [(s, g) for s, label, g in zip(scores, labels, groups) if not label]
        pairs = [
            (p > n) + 0.5 * (p == n)
            for p, group in zip(scores[labels], groups[labels])
            for n, other in rows
            if group == other
        ]
        assert metrics.auroc_within(scores, labels, groups) == pytest.approx(np.mean(pairs))
    # A score that knows the group alone: 0.5, where over all pairs it seems to know something.
    labels, groups = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool), np.repeat([1, 0], 4)
    assert metrics.auroc(groups, labels) == 0.75 and metrics.auroc_within(groups, labels, groups) == 0.5
    assert np.isnan(metrics.auroc_within([1, 2], [1, 0], ["a", "b"]))


def test_auroc_interval_covers_the_truth():
    """Two Gaussians one apart: AUROC is Phi(1 / sqrt(2)) = 0.7602. About 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    labels, covered = np.arange(100) < 40, 0
    for _ in range(400):
        low, high = metrics.auroc_interval(metrics.auroc(rng.normal(labels * 1.0), labels), 40, 60)
        covered += low < 0.7602 < high
    assert 0.92 < covered / 400 < 0.98
    assert (
        metrics.auroc_interval(1.0, 5, 5) == [1.0, 1.0]
        and np.isnan(metrics.auroc_interval(np.nan, 0, 5)).all()
    )


def test_calibration():
    rng = np.random.default_rng(0)
    scores = rng.random(200_000)
    labels = rng.random(200_000) < scores  # calibrated by construction
    good = metrics.calibration(scores, labels)
    assert good["ece"] < 0.01 and good["brier"] == pytest.approx(1 / 6, abs=0.01)
    assert metrics.calibration(np.full(10, 0.9), np.arange(10) < 3)["ece"] == pytest.approx(0.6)
    assert metrics.calibration(np.array([1.0, 0.0, 0.0]), np.array([1, 0, 0])) == {"ece": 0.0, "brier": 0.0}
    assert np.isnan(metrics.calibration(np.ones(3), np.ones(3))["ece"])


def test_spearman_of_a_constant_is_nan():
    assert np.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))
    assert metrics.spearman([1, 2, 30], [1, 4, 5]) == pytest.approx(1.0)


def test_kendall_counts_pairs():
    assert metrics.kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx((5 - 1) / 6)
    assert np.isnan(metrics.kendall([1, 1], [1, 2])) and np.isnan(metrics.kendall([1], [1]))


def test_nothing_that_json_does_not_know():
    assert metrics.without_nan({"a": [np.nan, 1.0], "b": (2, None)}) == {"a": [None, 1.0], "b": [2, None]}
    assert np.isnan(metrics.mean([])) and metrics.mean([np.nan, 2.0]) == 2.0
