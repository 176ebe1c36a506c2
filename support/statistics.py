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


def contrast_interval(*terms):
    """95 % interval of a sum of success rates with signs, each a term (+1 or -1, successes, episodes): (low, high).

    Of two terms it is Newcombe's score interval of a difference, of one Wilson's; of more what Zou and Donner (2008) call MOVER:
    the distances to the ends of the Wilson intervals add up as standard deviations do. The episodes count as independent; that
    policies met the same test states is not used, which makes it a little too wide.
    """
    value, below, above = 0.0, [], []
    for sign, successes, n in terms:
        rate, (low, high) = successes / n, wilson_interval(successes, n)
        value += sign * rate
        below.append(rate - low if sign > 0 else high - rate)
        above.append(high - rate if sign > 0 else rate - low)
    return value - math.hypot(*below), value + math.hypot(*above)


def paired_interval(gains):
    """95 % interval of the mean of `gains`, each -1, 0 or 1: of two policies on the same episodes, who won which: (low, high).

    Agresti and Min (2005): a textbook interval (Wald's), with half an episode added to each of the four outcomes of a pair, so
    that it does not collapse to a point where no episode changed.
    """
    n = len(gains) + 2
    won, lost = (gains.count(1) + 0.5) / n, (gains.count(-1) + 0.5) / n
    half = statistics.NormalDist().inv_cdf(0.975) * math.sqrt((won + lost - (won - lost) ** 2) / n)
    return won - lost - half, won - lost + half


def t_interval(values, least=-math.inf, most=math.inf):
    """Student's 95 % t interval of the mean of `values` (one number per seed): (low, high).

    Cut off at `least` and `most`, which no such mean can pass: 0 and 100 of a rate in %. Of two seeds it often would.

    NaN for fewer than two, and for values that are all alike: seeds that won equally many episodes did so by chance, and an
    interval without a width would say that the mean is known exactly.
    """
    if len(values) < 2 or math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-9):
        return math.nan, math.nan
    from scipy.stats import t  # late, as above

    middle, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return max(middle - half, least), min(middle + half, most)
