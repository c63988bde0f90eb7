"""What samples of times say: Welch's test, Holm's correction, intervals, drift. Pure.

Times are compared by their logarithms: timing noise is multiplicative and skewed, and a difference of mean logarithms
is a ratio of times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)
"""What stands for a hypothesis or a candidate."""


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / ((1.0 + numerator * d) or tiny)
            c = (1.0 + numerator / c) or tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-12:
            break
    return front * fraction


def t_tail(t: float, freedom: float) -> float:
    """Probability that Student's t exceeds ``t``."""
    half = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return half if t > 0 else 1.0 - half


def t_quantile(tail: float, freedom: float) -> float:
    """The ``t`` that Student's t exceeds with probability ``tail`` below one half, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return (low + high) / 2


class _Difference(NamedTuple):
    mean: float
    error: float
    freedom: float


def _difference(a: Sequence[float], b: Sequence[float], min_variance: float = 0.0) -> _Difference:
    """Difference of two means with Welch's standard error and degrees of freedom.

    A sample without any spread shows the clock's resolution, not its noise: it is given the other's variance.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a comparison needs at least 2 samples on each side, got {len(a)} and {len(b)}")
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    variance_a = max(min_variance, statistics.variance(a, mean_a))
    variance_b = max(min_variance, statistics.variance(b, mean_b))
    if not variance_a or not variance_b:
        variance_a = variance_b = variance_a or variance_b
    error_a, error_b = variance_a / len(a), variance_b / len(b)
    squared = error_a + error_b
    if not squared:
        return _Difference(mean_a - mean_b, 0.0, 1.0)
    freedom = squared**2 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))
    return _Difference(mean_a - mean_b, math.sqrt(squared), freedom)


def welch_p_value(a: Sequence[float], b: Sequence[float], min_variance: float = 0.0) -> float:
    """Two-sided p-value of Welch's test that two samples have the same mean.

    Args:
        a: A sample of at least 2 values.
        b: The other.
        min_variance: What a sample's variance is taken for, where it is less. Default: ``0.0``.
    """
    mean, error, freedom = _difference(a, b, min_variance)
    if not error:
        return 1.0 if not mean else 0.0
    return 2 * t_tail(abs(mean) / error, freedom)


class Comparison(NamedTuple):
    """Two sets of times.

    Attributes:
        ratio: Geometric mean of the first over that of the second.
        low, high: Its 95 % confidence interval.
        p_faster: One-sided p-value of "the first is not faster than the second by more than the margin".
    """

    ratio: float
    low: float
    high: float
    p_faster: float


def p_faster(times: Sequence[float], baseline: Sequence[float], margin: float = 0.0) -> float:
    """The one-sided p-value of :func:`compare`, without the interval."""
    return _p_faster(_difference(_logs(times), _logs(baseline)), margin)


def _logs(times: Sequence[float]) -> list[float]:
    return [math.log(t) for t in times]


def _p_faster(difference: _Difference, margin: float) -> float:
    limit = math.log1p(-margin)
    if not difference.error:
        return 0.0 if difference.mean < limit else 1.0
    return t_tail((limit - difference.mean) / difference.error, difference.freedom)


def p_slower_than(
    times: Sequence[float], baseline: Sequence[float], known: tuple[float, float, float], tolerance: float
) -> float:
    """The one-sided p-value of "times over baseline is not above a ratio known before by more than the tolerance".

    Args:
        times: At least 2 positive times.
        baseline: The same, to compare with.
        known: The ratio with its 95 % interval.
        tolerance: Part of the known ratio.
    """
    now = _difference(_logs(times), _logs(baseline))
    ratio, low, high = known
    error = math.hypot(now.error, math.log(high / low) / (2 * 1.96))  # 1.96: of a normal distribution, 95 %
    excess = now.mean - math.log(ratio) - math.log1p(tolerance)
    if not error:
        return 0.0 if excess > 0 else 1.0
    return t_tail(excess / error, now.freedom)


def compare(times: Sequence[float], baseline: Sequence[float], margin: float = 0.0) -> Comparison:
    """Compare two sets of times, in any unit, by Welch's test on their logarithms.

    Args:
        times: At least 2 positive times.
        baseline: The same, to compare with.
        margin: Part of the baseline's time by which ``times`` must be faster. Default: ``0.0``.
    """
    difference = _difference(_logs(times), _logs(baseline))
    mean, error, freedom = difference
    half = t_quantile(0.025, freedom) * error if error else 0.0
    return Comparison(math.exp(mean), math.exp(mean - half), math.exp(mean + half), _p_faster(difference, margin))


def holm(p_values: Mapping[Key, float], alpha: float, tests: int | None = None) -> set[Key]:
    """The hypotheses that Holm's step-down procedure rejects.

    Args:
        p_values: By hypothesis.
        alpha: Probability of any false rejection.
        tests: Number of hypotheses, where more were looked at than have a p-value. Default: ``len(p_values)``.
    """
    tests = len(p_values) if tests is None else tests
    rejected = set()
    for i, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > alpha / (tests - i):
            break
        rejected.add(key)
    return rejected


def spread(times: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for a single sample."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def without_drift(times: Mapping[Key, Sequence[float]]) -> dict[Key, list[float]]:
    """Interleaved times with what all candidates of a round share taken out.

    A machine that gets slower slows all candidates of a round alike. The average of a round's deviations from the
    candidates' own medians is that common part. Taking out an estimate from k candidates also takes out a k-th of each
    one's own noise, so the deviations are scaled by sqrt(k / (k - 1)): Welch's test then sees the true variance.

    What then lies beyond Tukey's fences, 1.5 interquartile ranges outside the quartiles, is an interrupt and not the
    candidate: it is moved to the fence, because a mean has no defence of its own.

    Args:
        times: Positive times per candidate; the i-th of each is from round i.
    """
    logs = {key: _logs(values) for key, values in times.items()}
    centers = {key: statistics.median(values) for key, values in logs.items()}
    steady: dict[Key, list[float]] = {key: [] for key in logs}
    for i in range(max(map(len, logs.values()), default=0)):
        deviations = {key: values[i] - centers[key] for key, values in logs.items() if len(values) > i}
        k = len(deviations)
        # Of fewer than 5 the median is one of them too often, whose own noise would vanish.
        average = statistics.median if k > 4 else statistics.fmean
        common = average(deviations.values()) if k > 1 else 0.0
        scale = math.sqrt(k / (k - 1)) if k > 1 else 1.0
        for key, deviation in deviations.items():
            steady[key].append(centers[key] + scale * (deviation - common))
    return {key: [math.exp(value) for value in _fenced(values)] for key, values in steady.items()}


def _fenced(values: list[float]) -> list[float]:
    if len(values) < 5:  # no quartiles to speak of
        return values
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    reach = 1.5 * (high - low)
    return [min(max(value, low - reach), high + reach) for value in values]
