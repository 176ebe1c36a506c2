"""Intervals for success rates: over episodes, and over seeds."""

import math
import statistics


def wilson_interval(successes, n, confidence=0.95):
    """Wilson score interval of a success rate: (low, high), both in [0, 1]. With n = 0 nothing is known: (0, 1).

    Preferred over the textbook p ± z sqrt(p (1 - p) / n) because it stays inside [0, 1] and does not collapse to a
    point at 0 or n successes, which is where robot evaluations often are.
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # late: it takes more than half a second to import

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def difference_interval(successes_before, n_before, successes_after, n_after):
    """95 % interval of the difference of two success rates, after minus before: (low, high) (Newcombe's score interval).

    Its parts are the two Wilson intervals. The episodes count as independent; that both policies met the same test states is not
    used, which makes it a little too wide.
    """
    before, after = successes_before / n_before, successes_after / n_after
    low_before, high_before = wilson_interval(successes_before, n_before)
    low_after, high_after = wilson_interval(successes_after, n_after)
    low = math.hypot(after - low_after, high_before - before)
    high = math.hypot(high_after - after, before - low_before)
    return after - before - low, after - before + high


def t_interval(values, confidence=0.95):
    """Student's t interval of the mean of `values` (one number per seed): (low, high); NaN for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    from scipy.stats import t  # late, as above

    middle, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return middle - half, middle + half
