"""How good a score is: ranking, calibration, correlation. numpy arrays in, floats out; NaN where nothing can be measured."""

import math

import numpy as np


def auroc(scores, labels):
    """Probability that a positive scores higher than a negative, ties counted half; NaN when a class is missing."""
    labels = np.asarray(labels, bool)
    n1, n0 = int(labels.sum()), int((~labels).sum())
    if not n1 or not n0:
        return math.nan
    from scipy.stats import rankdata  # late, as below: it takes more than half a second to import

    return float((rankdata(scores)[labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def auroc_within(scores, labels, groups):
    """The same over pairs of one group only, so that knowing which groups have more positives is worth nothing; NaN where no
    group has both classes."""
    scores, labels, groups = np.asarray(scores), np.asarray(labels, bool), np.asarray(groups)
    won = pairs = 0
    for group in np.unique(groups):
        rows = groups == group
        n = int(labels[rows].sum()) * int((~labels[rows]).sum())
        if n:
            won, pairs = won + n * auroc(scores[rows], labels[rows]), pairs + n
    return won / pairs if pairs else math.nan


def auroc_interval(value, positives, negatives):
    """95 % interval [low, high] of an AUROC from so many positives and negatives (Hanley and McNeil, 1982); NaN for NaN."""
    if math.isnan(value):
        return [math.nan, math.nan]
    # P(two positives above one negative), P(one above two)
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (positives - 1) * (one - value**2) + (negatives - 1) * (two - value**2)
    half = 1.96 * math.sqrt(variance / (positives * negatives))
    return [max(0.0, value - half), min(1.0, value + half)]


def average_precision(scores, labels):
    """Sum over thresholds of precision x gain in recall (no interpolation; equal scores share one threshold)."""
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    if not labels.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    # last row of each group of equal scores
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    gains = np.diff(hits[last], prepend=0)
    return float((gains * hits[last] / (last + 1)).sum() / labels.sum())


def calibration(scores, labels, bins=10):
    """{"ece", "brier"} of scores (n,) in [0, 1] read as probabilities of labels (n,); NaN where a class is missing.

    ECE: mean over equal-width bins of |share of positives - mean score|. Brier: mean squared error of the score.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    n1 = labels.sum()
    if n1 == 0 or n1 == len(labels):
        return {"ece": math.nan, "brier": math.nan}
    which = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(which, (labels - scores) / len(labels), bins)
    return {"ece": float(np.abs(gaps).sum()), "brier": float(((scores - labels) ** 2).mean())}


def binary_metrics(scores, labels):
    """{"auroc", "average_precision", "prevalence" (what a random score's average precision would be), "ece", "brier"}."""
    return {
        "auroc": auroc(scores, labels),
        "average_precision": average_precision(scores, labels),
        "prevalence": float(np.mean(labels)) if len(labels) else math.nan,
        **calibration(scores, labels),
    }


def in_words(metrics):
    """`binary_metrics` on one line."""
    return (
        f"AUROC {metrics['auroc']:.3f}, average precision {metrics['average_precision']:.3f} (random "
        f"{metrics['prevalence']:.3f}), ECE {metrics['ece']:.3f}, Brier {metrics['brier']:.3f}"
    )


def spearman(x, y):
    """Rank correlation; NaN where one side is constant (nothing to rank)."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def kendall(x, y):
    """Kendall's tau: (pairs in the same order - pairs in opposite order) / pairs, ties aside; NaN where nothing is ordered."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).statistic)


def mean(values):
    """Mean of the values that are not NaN; NaN of none."""
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


def without_nan(value):
    """The same nested value with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
