"""The statistics against SciPy, the clock against work of known length, and races against planted timing sources."""

import math
import random
import time

import mlx.core as mx
import numpy as np
import pytest
from scipy import stats

from mlx_marlin import measure
from mlx_marlin.race import Rules, race

RUNS = 100


# Statistics


@pytest.mark.parametrize("freedom", [1.0, 2.5, 4.0, 19.0, 38.0, 500.0])
def test_student_t_is_scipys(freedom):
    for t in (-7.0, -1.0, 0.0, 0.3, 2.0, 12.0, 60.0):
        assert measure.t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)
    for tail in (0.4, 0.025, 1e-6):
        assert measure.t_quantile(tail, freedom) == pytest.approx(stats.t.isf(tail, freedom), rel=1e-8)


@pytest.mark.parametrize("sizes", [(2, 2), (5, 20), (40, 7)])
def test_welch_is_scipys(sizes):
    rng = np.random.default_rng(sum(sizes))
    a, b = np.exp(rng.normal(0.0, 0.1, sizes[0])), np.exp(rng.normal(0.05, 0.3, sizes[1]))
    logs = np.log(a), np.log(b)
    assert measure.welch_p_value(*logs) == pytest.approx(stats.ttest_ind(*logs, equal_var=False).pvalue, rel=1e-9)
    comparison = measure.compare(a.tolist(), b.tolist())
    interval = np.exp(stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95))
    assert (comparison.low, comparison.high) == pytest.approx(tuple(interval), rel=1e-9)
    assert comparison.ratio == pytest.approx(math.exp(logs[0].mean() - logs[1].mean()))
    margin = stats.ttest_ind(logs[0], logs[1] + math.log(0.9), equal_var=False, alternative="less")
    assert measure.compare(a.tolist(), b.tolist(), 0.1).p_faster == pytest.approx(margin.pvalue, rel=1e-9)


def test_samples_without_spread():
    assert measure.welch_p_value([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert measure.welch_p_value([1.0, 1.0], [2.0, 2.0]) == 0.0
    assert measure.compare([1.0, 1.0], [1.0, 1.1, 0.9]).p_faster > 0.1
    with pytest.raises(ValueError, match="at least 2 samples"):
        measure.compare([1.0], [1.0, 2.0])


def test_holm():
    p = {"a": 0.01, "b": 0.02, "c": 0.04}
    assert measure.holm(p, 0.05) == {"a", "b", "c"}  # 0.05 / 3, 0.05 / 2, 0.05
    assert measure.holm(p, 0.05, tests=10) == set()  # 0.05 / 10
    assert measure.holm({"a": 0.001, "b": 0.2}, 0.05) == {"a"}
    assert measure.holm({}, 0.05) == set()


def test_spread():
    assert measure.spread([1.0]) == 0.0
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


# The clock


def test_every_sample_is_evaluated_in_order():
    seen = []

    def step(x, i):
        seen.append(i)
        return x + i

    chain = measure.Chain(step, mx.zeros((4,)), floor=1.0)  # a huge floor: chains of two lengths
    chain.warm_up(3)
    assert chain() > 0 and chain() > 0
    assert seen == list(range(len(seen))) and len(seen) > 10


def test_chained_calls_wait_for_each_other():
    x = mx.ones((8,))
    first = x * 2
    chained = mx.depends([x], [first])[0]
    assert mx.array_equal(chained, x)


def test_slope_cancels_the_launch_floor(monkeypatch):
    # A machine where a call takes 1 ms and launching an evaluation 10 ms, on a clock that only the test moves.
    now = [0.0]
    pending = [0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def evaluate(_):
        now[0] += 0.010 + 0.001 * pending[0]
        pending[0] = 0

    monkeypatch.setattr(measure.mx, "eval", evaluate)

    def step(x, i):
        pending[0] += 1
        return x

    chain = measure.Chain(step, mx.zeros((1,)), floor=0.010)
    chain.warm_up(5)
    assert chain() == pytest.approx(0.001)
    # Where the floor is below 1 % of a call, single calls are timed.
    chain = measure.Chain(step, mx.zeros((1,)), floor=0.0001)
    chain.warm_up(5)
    assert chain() == pytest.approx(0.011)


def test_longer_work_takes_longer():
    x = mx.ones((256, 256))
    floor = measure.launch_floor()
    clocks = [measure.Chain(lambda x, i, n=n: mx.linalg.norm(mx.concatenate([x] * n)), x, floor) for n in (1, 40)]
    for clock in clocks:
        clock.warm_up(3)
    assert np.median([clocks[0]() for _ in range(5)]) < np.median([clocks[1]() for _ in range(5)])


# Races


class Planted:
    """A timing source of a known mean: skewed multiplicative noise."""

    def __init__(self, mean, noise, rng):
        self.mean, self.noise, self.rng = mean, noise, rng

    def __call__(self):
        return self.mean * math.exp(self.rng.gauss(0.0, self.noise))


def crashing():
    raise RuntimeError("kernel failed to compile")


def outcomes(times, noise, others=(), count=RUNS):
    """Races of candidates with these mean times (the first is the incumbent) and other clocks."""
    results = []
    for seed in range(count):
        rng = random.Random(seed)
        clocks = {i: Planted(t, noise, rng) for i, t in enumerate(times)}
        clocks |= {f"other{i}": clock for i, clock in enumerate(others)}
        results.append(race(clocks, 0, Rules(seed=seed)))
    return results


def share(results, winner):
    return sum(r.winner == winner for r in results) / len(results)


def test_faster_by_ten_percent_wins_at_three_percent_noise():
    results = outcomes([1.0, 0.9], 0.03)
    assert share(results, 1) >= 0.99
    covered = sum(r.comparison.low <= 0.9 <= r.comparison.high for r in results if r.winner == 1)
    assert covered >= 0.88 * RUNS  # 95 % intervals; 88 of 100 is 3 standard deviations below


def test_slower_by_ten_percent_never_wins_at_three_percent_noise():
    results = outcomes([1.0, 1.1], 0.03)
    assert share(results, 0) >= 0.99 and all(r.decision == "default" for r in results)


def test_equal_keeps_the_default_at_three_percent_noise():
    assert share(outcomes([1.0, 1.0], 0.03), 0) >= 0.99


def test_many_equals_keep_the_default():
    assert share(outcomes([1.0] * 20, 0.03, count=50), 0) == 1.0


@pytest.mark.parametrize("slower", [1.05, 1.1, 1.3])
def test_slower_is_never_taken_at_thirty_percent_noise(slower):
    assert share(outcomes([1.0, slower], 0.3), 0) >= 0.99


def test_thirty_percent_noise_may_be_undecided():
    results = outcomes([1.0, 0.9], 0.3)
    assert {r.decision for r in results} >= {"undecided"}
    assert all(r.decision == ("faster" if r.winner else r.decision) for r in results)


def test_the_right_one_of_many_wins():
    results = outcomes([1.0, 1.02, 0.95, 1.3, 0.8, 0.99, 3.0, 0.9], 0.03)
    assert share(results, 4) >= 0.99


def test_crashing_candidates_never_win():
    results = outcomes([1.0, 1.1], 0.03, [crashing, lambda: 1 / 0])
    assert share(results, 0) == 1.0
    assert all(
        r.failures
        == {"other0": "RuntimeError: kernel failed to compile", "other1": "ZeroDivisionError: division by zero"}
        for r in results
    )


def test_candidates_that_crash_later_never_win():
    class Fragile:
        def __init__(self):
            self.left = 25  # fast, through the first round of samples, then dead

        def __call__(self):
            self.left -= 1
            if self.left < 0:
                raise MemoryError("out of memory")
            return 0.5

    for seed in range(RUNS):
        rng = random.Random(seed)
        result = race({0: Planted(1.0, 0.03, rng), 1: Fragile()}, 0, Rules(seed=seed))
        assert result.winner == 0 and result.failures == {1: "MemoryError: out of memory"}


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_a_clock_that_gives_nonsense_never_wins(nonsense):
    result = race({0: lambda: 1.0, 1: lambda: nonsense}, 0)
    assert result.winner == 0 and "the clock gave" in result.failures[1]


def test_the_incumbents_failure_is_an_error():
    with pytest.raises(RuntimeError, match="failed to compile"):
        race({0: crashing, 1: lambda: 1.0}, 0)
    with pytest.raises(ValueError, match="not among the candidates"):
        race({1: lambda: 1.0}, 0)


def test_interrupts_pass():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race({0: lambda: 1.0, 1: interrupted}, 0)


def test_drifting_machine_does_not_mislead():
    # Everything gets 50 % slower during the race: interleaving keeps the comparison fair.
    wrong = 0
    for seed in range(RUNS):
        rng, calls = random.Random(seed), [0]

        def clock(mean):
            calls[0] += 1
            return mean * (1 + calls[0] / 80) * math.exp(rng.gauss(0.0, 0.03))

        wrong += race({0: lambda: clock(1.0), 1: lambda: clock(1.05)}, 0, Rules(seed=seed)).winner != 0
    assert wrong <= 1


@pytest.mark.parametrize("candidates", [2, 3, 5, 12])
def test_without_drift_keeps_means_and_variances(candidates):
    rng = np.random.default_rng(candidates)
    drift = np.exp(np.cumsum(rng.normal(0.0, 0.2, 4000)))
    own = np.exp(rng.normal(0.0, 0.05, (candidates, 4000)))
    steady = measure.without_drift({i: (0.9**i * drift * own[i]).tolist() for i in range(candidates)})
    for i in range(candidates):
        logs = np.log(steady[i])
        assert logs.std() == pytest.approx(0.05, rel=0.15)
        if i:
            assert logs.mean() - np.log(steady[0]).mean() == pytest.approx(i * math.log(0.9), abs=0.005)


def test_a_wildly_drifting_machine_still_decides():
    # A random walk of 3 % per call: the drift over a race is several times the difference that is to be found.
    def result(mean, seed):
        rng, world = random.Random(seed), [1.0]

        def clock(mean):
            world[0] *= math.exp(rng.gauss(0.0, 0.03))
            return mean * world[0] * math.exp(rng.gauss(0.0, 0.02))

        clocks = {i: lambda m=m: clock(m) for i, m in enumerate((1.0, mean, 1.1, 1.2))}
        return race(clocks, 0, Rules(seed=seed)).winner

    wins = [sum(result(mean, seed) == 1 for seed in range(RUNS)) for mean in (0.9, 1.0, 1.1)]
    assert wins[0] >= 95 and wins[1] <= 1 and wins[2] == 0


def test_interrupts_do_not_hide_a_difference():
    # Every tenth sample takes three times as long: 10 % are still found, mostly.
    def winner(mean, seed):
        rng = random.Random(seed)
        clocks = [
            lambda m=m: m * math.exp(rng.gauss(0.0, 0.03)) * (3.0 if rng.random() < 0.1 else 1.0) for m in (1.0, mean)
        ]
        return race(dict(enumerate(clocks)), 0, Rules(seed=seed)).winner

    assert sum(winner(0.9, seed) for seed in range(RUNS)) >= 60
    assert sum(winner(1.0, seed) for seed in range(RUNS)) <= 1


def test_false_alarms_stay_below_alpha():
    # One stage, no margin, two equal candidates: the rate of the test itself.
    rejected = 0
    for seed in range(400):
        rng = random.Random(seed)
        samples = {key: [math.exp(rng.gauss(0.0, 0.1)) for _ in range(20)] for key in "ab"}
        steady = measure.without_drift(samples)
        rejected += measure.p_faster(steady["a"], steady["b"]) < 0.05
    assert rejected <= 20 + 3 * 4.4  # 5 % of 400, 3 standard deviations


def test_hopeless_candidates_leave_early():
    calls = dict.fromkeys("abcd", 0)

    def clock(key, mean, rng=random.Random(0)):
        calls[key] += 1
        return mean * math.exp(rng.gauss(0.0, 0.03))

    result = race(
        {key: lambda key=key, mean=mean: clock(key, mean) for key, mean in zip("abcd", (1.0, 1.4, 3.0, 0.9))}, "a"
    )
    assert result.winner == "d" and calls["c"] == 1 and calls["b"] <= 5


def test_ties_go_to_the_first_in_the_callers_order():
    results = outcomes([1.0, 0.8, 0.8, 0.8], 0.03)
    assert share(results, 1) >= 0.8  # an argmin would take each a third of the time


def test_cost_weighs_the_times():
    clocks = {0: lambda: 1.0, 1: lambda: 0.8}
    assert race(clocks, 0).winner == 1
    assert race(clocks, 0, cost=lambda key: 2.0 if key else 1.0).winner == 0


def test_deadline_ends_the_race_undecided():
    result = race({0: lambda: 1.0, 1: lambda: 0.5}, 0, deadline=time.perf_counter() - 1.0)
    assert (result.winner, result.decision) == (0, "undecided")


@pytest.mark.parametrize("bad", [{"rounds": 1}, {"warmup": -1}, {"margin": 1.0}, {"alpha": 0.0}])
def test_bad_rules(bad):
    with pytest.raises(ValueError, match="got"):
        Rules(**bad)
