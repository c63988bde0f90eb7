"""The statistics of times, against SciPy and against what they promise."""

import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mlx_marlin.measure import stats


@pytest.mark.parametrize("freedom", [1.0, 2.5, 4.0, 19.0, 38.0, 500.0])
def test_student_t_is_scipys(freedom):
    for t in (-7.0, -1.0, 0.0, 0.3, 2.0, 12.0, 60.0):
        assert stats.t_tail(t, freedom) == pytest.approx(scipy_stats.t.sf(t, freedom), rel=1e-9)
    for tail in (0.4, 0.025, 1e-6):
        assert stats.t_quantile(tail, freedom) == pytest.approx(scipy_stats.t.isf(tail, freedom), rel=1e-8)


@pytest.mark.parametrize("sizes", [(2, 2), (5, 20), (40, 7)])
def test_welch_is_scipys(sizes):
    rng = np.random.default_rng(sum(sizes))
    a, b = np.exp(rng.normal(0.0, 0.1, sizes[0])), np.exp(rng.normal(0.05, 0.3, sizes[1]))
    logs = np.log(a), np.log(b)
    assert stats.welch_p_value(*logs) == pytest.approx(scipy_stats.ttest_ind(*logs, equal_var=False).pvalue, rel=1e-9)
    comparison = stats.compare(a.tolist(), b.tolist())
    interval = np.exp(scipy_stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95))
    assert (comparison.low, comparison.high) == pytest.approx(tuple(interval), rel=1e-9)
    assert comparison.ratio == pytest.approx(math.exp(logs[0].mean() - logs[1].mean()))
    margin = scipy_stats.ttest_ind(logs[0], logs[1] + math.log(0.9), equal_var=False, alternative="less")
    assert stats.compare(a.tolist(), b.tolist(), 0.1).p_faster == pytest.approx(margin.pvalue, rel=1e-9)


def test_samples_without_spread():
    assert stats.welch_p_value([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert stats.welch_p_value([1.0, 1.0], [2.0, 2.0]) == 0.0
    assert stats.compare([1.0, 1.0], [1.0, 1.1, 0.9]).p_faster > 0.1
    with pytest.raises(ValueError, match="at least 2 samples"):
        stats.compare([1.0], [1.0, 2.0])


def test_holm():
    p = {"a": 0.01, "b": 0.02, "c": 0.04}
    assert stats.holm(p, 0.05) == {"a", "b", "c"}  # 0.05 / 3, 0.05 / 2, 0.05
    assert stats.holm(p, 0.05, tests=10) == set()  # 0.05 / 10
    assert stats.holm({"a": 0.001, "b": 0.2}, 0.05) == {"a"}
    assert stats.holm({}, 0.05) == set()


def test_spread():
    assert stats.spread([1.0]) == 0.0
    assert stats.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("candidates", [2, 3, 5, 12])
def test_without_drift_keeps_means_and_variances(candidates):
    rng = np.random.default_rng(candidates)
    drift = np.exp(np.cumsum(rng.normal(0.0, 0.2, 4000)))
    own = np.exp(rng.normal(0.0, 0.05, (candidates, 4000)))
    steady = stats.without_drift({i: (0.9**i * drift * own[i]).tolist() for i in range(candidates)})
    for i in range(candidates):
        logs = np.log(steady[i])
        assert logs.std() == pytest.approx(0.05, rel=0.15)
        if i:
            assert logs.mean() - np.log(steady[0]).mean() == pytest.approx(i * math.log(0.9), abs=0.005)


def test_false_alarms_stay_below_alpha():
    # One stage, no margin, two equal candidates: the rate of the test itself.
    rejected = 0
    for seed in range(400):
        rng = random.Random(seed)
        samples = {key: [math.exp(rng.gauss(0.0, 0.1)) for _ in range(20)] for key in "ab"}
        steady = stats.without_drift(samples)
        rejected += stats.p_faster(steady["a"], steady["b"]) < 0.05
    assert rejected <= 20 + 3 * 4.4  # 5 % of 400, 3 standard deviations


@pytest.mark.parametrize("true, rejected", [(1.0, False), (1.2, False), (1.5, True)])
def test_slower_than_a_known_ratio(true, rejected):
    """Known: 0.8 of the baseline's time. Beyond a quarter more than that it counts."""
    rng = np.random.default_rng(0)
    baseline = np.exp(rng.normal(0.0, 0.03, 20)).tolist()
    times = (0.8 * true * np.exp(rng.normal(0.0, 0.03, 20))).tolist()
    p = stats.p_slower_than(times, baseline, (0.8, 0.78, 0.82), 0.25)
    assert (p < 0.001) == rejected and 0.0 <= p <= 1.0


def test_an_unsure_known_ratio_needs_more():
    times, baseline = [1.29, 1.31] * 5, [0.99, 1.01] * 5
    sure, unsure = (stats.p_slower_than(times, baseline, known, 0.2) for known in ((1, 0.99, 1.01), (1, 0.7, 1.4)))
    assert sure < 0.01 < 0.2 < unsure


def test_slower_than_a_known_ratio_without_any_spread():
    for ratio, p in ((1.2, 1.0), (1.3, 0.0)):
        assert stats.p_slower_than([ratio] * 3, [1.0] * 3, (1.0, 1.0, 1.0), 0.25) == p
