"""Intervals for success rates."""

import math


def wilson_interval(successes, n, z=1.96):
    """Wilson score interval of a success rate: (low, high), both in [0, 1]. With n = 0 nothing is known: (0, 1).

    Preferred over the textbook p ± z sqrt(p (1 - p) / n) because it stays inside [0, 1] and does not collapse to a
    point at 0 or n successes, which is where robot evaluations often are.
    """
    if n == 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} episodes")
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 or n successes one end is exactly the rate; rounding would put it 1e-17 on the wrong side.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high
