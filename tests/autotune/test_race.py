"""Races against planted timing sources."""

import math
import random
import time

import pytest

from mlx_marlin.measure.race import Limits, RaceSettings, race

RUNS = 100


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
        results.append(race(clocks, 0, RaceSettings(seed=seed)))
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
        result = race({0: Planted(1.0, 0.03, rng), 1: Fragile()}, 0, RaceSettings(seed=seed))
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

        wrong += race({0: lambda: clock(1.0), 1: lambda: clock(1.05)}, 0, RaceSettings(seed=seed)).winner != 0
    assert wrong <= 1


def test_a_wildly_drifting_machine_still_decides():
    # A random walk of 3 % per call: the drift over a race is several times the difference that is to be found.
    def result(mean, seed):
        rng, world = random.Random(seed), [1.0]

        def clock(mean):
            world[0] *= math.exp(rng.gauss(0.0, 0.03))
            return mean * world[0] * math.exp(rng.gauss(0.0, 0.02))

        clocks = {i: lambda m=m: clock(m) for i, m in enumerate((1.0, mean, 1.1, 1.2))}
        return race(clocks, 0, RaceSettings(seed=seed)).winner

    wins = [sum(result(mean, seed) == 1 for seed in range(RUNS)) for mean in (0.9, 1.0, 1.1)]
    assert wins[0] >= 95 and wins[1] <= 1 and wins[2] == 0


def test_interrupts_do_not_hide_a_difference():
    # Every tenth sample takes three times as long: 10 % are still found, mostly.
    def winner(mean, seed):
        rng = random.Random(seed)
        clocks = [
            lambda m=m: m * math.exp(rng.gauss(0.0, 0.03)) * (3.0 if rng.random() < 0.1 else 1.0) for m in (1.0, mean)
        ]
        return race(dict(enumerate(clocks)), 0, RaceSettings(seed=seed)).winner

    assert sum(winner(0.9, seed) for seed in range(RUNS)) >= 60
    assert sum(winner(1.0, seed) for seed in range(RUNS)) <= 1


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


def test_cost_does_not_change_the_times():
    result = race({0: lambda: 1.0, 1: lambda: 1.2}, 0, cost=lambda key: 0.5 if key else 1.0)
    assert result.winner == 1 and result.decision == "faster" and result.comparison.ratio == pytest.approx(1.2)
    assert set(result.samples[1]) == set(result.fresh[1]) == {1.2}


# The end of time


@pytest.fixture
def now(monkeypatch):
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr("mlx_marlin.measure.race.time.perf_counter", lambda: now[0])
    return now


class Slow:
    """A clock that takes its time, to warm up and to sample."""

    def __init__(self, now, seconds=1.0, warm=1.0, result=1.0):
        self.now, self.seconds, self.warm, self.result = now, seconds, warm, result
        self.warmed, self.samples = 0, 0

    def warm_up(self, calls):
        self.warmed += 1
        self.now[0] += self.warm

    def __call__(self):
        self.samples += 1
        self.now[0] += self.seconds
        return self.result


def test_deadline_ends_the_race_undecided():
    result = race({0: lambda: 1.0, 1: lambda: 0.5}, 0, limits=Limits(deadline=time.perf_counter() - 1.0))
    assert (result.winner, result.decision, result.complete) == (0, "undecided", False)


def test_the_incumbent_enters_first_and_nothing_after_the_deadline(now):
    clocks = {key: Slow(now) for key in range(5)}
    result = race(clocks, 3, limits=Limits(deadline=2.5))
    assert [c.warmed for c in clocks.values()] == [1, 1, 0, 1, 0] and not any(c.samples for c in clocks.values())
    assert not result.complete and result.winner == 3


def test_the_deadline_ends_a_round_in_its_middle(now):
    clocks = {key: Slow(now, warm=0.0) for key in range(4)}
    result = race(clocks, 0, limits=Limits(deadline=5.5))
    assert sum(c.samples for c in clocks.values()) == 6 and not result.complete


def test_a_share_leaves_two_rounds(now):
    """A share that is over before the race begins still gives an outcome; a longer one gives as many rounds."""
    for share, rounds in ((-1.0, 2), (7.0, 4)):
        now[0] = 0.0
        clocks = {key: Slow(now, warm=0.0) for key in range(2)}
        result = race(clocks, 0, limits=Limits(share=share))
        assert [c.samples for c in clocks.values()] == [rounds, rounds] and result.complete


def test_a_control_is_sampled_in_each_round_and_never_wins(now):
    control = Slow(now, result=0.001)
    clocks = {0: lambda: 1.0, 1: lambda: 0.5}
    result = race(clocks, 0, RaceSettings(rounds=6), control=control)
    assert result.winner == 1 and control.warmed == 1
    assert result.control == [0.001] * len(result.fresh[0])
    assert control.samples == len(result.samples[0]) + len(result.fresh[0])
    kept = race({0: lambda: 1.0, 1: lambda: 1.0}, 0, RaceSettings(rounds=6), control=control)
    assert kept.winner == 0 and len(kept.control) == len(kept.samples[0])


@pytest.mark.parametrize("bad", [{"rounds": 1}, {"warmup": -1}, {"margin": 1.0}, {"alpha": 0.0}])
def test_bad_rules(bad):
    with pytest.raises(ValueError, match="got"):
        RaceSettings(**bad)
