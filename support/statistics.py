"""Intervals for success rates."""

from scipy.stats import binomtest


def wilson_interval(successes, n, confidence=0.95):
    """Wilson score interval of a success rate: (low, high), both in [0, 1]. With n = 0 nothing is known: (0, 1).

    Preferred over the textbook p ± z sqrt(p (1 - p) / n) because it stays inside [0, 1] and does not collapse to a
    point at 0 or n successes, which is where robot evaluations often are.
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
