"""The sequential test behind the selector: when it looks, what it spends, how seldom it is wrong."""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest

from mlx_marlin.selection import evidence
from mlx_marlin.selection.evidence import LOOKS, Ledger
from mlx_marlin.selection.selector import MixedKernelSelector

MIXED = [2, 2, 3, 4]


def false_switches(runs, records, kernels, draw):
    """Share of runs in which equal kernels are ever switched, at the level of a whole problem."""
    switched = 0
    for seed in range(runs):
        rng = random.Random(seed)
        ledger = Ledger(100, 0.05)
        for i in range(records):
            ledger.record(kernels[i % len(kernels)], draw(rng))
            ledger.leader(kernels[0], kernels)
        switched += ledger.switches > 0
    return switched / runs


DRAWS = {
    "normal": lambda rng: 1 + 0.03 * rng.gauss(0, 1),
    "exponential": lambda rng: rng.expovariate(1.0) + 1e-9,
    "hiccups": lambda rng: (1 + 0.03 * rng.gauss(0, 1)) * (10 if rng.random() < 0.03 else 1),
    "coarse clock": lambda rng: 1.0 + 0.1 * (rng.random() < 0.5),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_equal_kernels_are_rarely_switched(draw, names):
    assert false_switches(60, 1000, list(names), DRAWS[draw]) <= 0.05


def runs_that_switch(seeds, draw) -> int:
    """How many runs of 10 000 records through the public methods ever switch, over all looks, restarts and
    buckets.
    """
    switched = 0
    for seed in seeds:
        selector, rng = MixedKernelSelector(seed=seed), random.Random(seed)
        for _ in range(10_000):
            rows = rng.choice((1, 8, 20, 64, 500))
            name, _ = selector.select_kernel(rows, MIXED)
            selector.record_latency(name, rows, DRAWS[draw](rng))
        switched += selector.get_statistics()["switches"] > 0
    return switched


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_equal_kernels_are_switched_in_at_most_50_of_1000_runs(draw):
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(runs_that_switch, range(start, start + 50), draw) for start in range(0, 1000, 50)]
        assert sum(part.result() for part in parts) <= 50


@pytest.fixture
def looks(monkeypatch):
    """The numbers of samples at which the test looked; what it said of them is planted."""
    seen, answers = [], {}

    def p_value(mine, its, min_variance):
        seen.append(len(mine))
        return answers.get(len(mine), 1.0)

    monkeypatch.setattr(evidence, "welch_p_value", p_value)
    return seen, answers


def race_of(ledger, count, challenger_ms=0.5):
    """The leader after each of so many rounds of one sample of both."""
    leaders = []
    for _ in range(count):
        ledger.record("a", 1.0)
        ledger.record("b", challenger_ms)
        leaders.append(ledger.leader("a", ["a", "b"]))
    return leaders


def test_it_looks_when_a_look_is_due_and_then_begins_anew(looks):
    seen, _ = looks
    assert set(race_of(Ledger(100, 0.05), 90)) == {"a"}
    assert seen == [*LOOKS, LOOKS[0], LOOKS[1]]  # of the samples since the last look at 80: 5 and 10


@pytest.mark.parametrize("look", LOOKS)
def test_a_test_waits_for_the_next_look(look, looks):
    _, answers = looks
    answers.update({n: 0.0 for n in range(1, 81) if n == look or n not in LOOKS})
    assert race_of(Ledger(100, 0.05), look) == ["a"] * (look - 1) + ["b"]


def test_slower_is_never_taken_however_significant(looks):
    _, answers = looks
    answers.update(dict.fromkeys(LOOKS, 0.0))
    assert set(race_of(Ledger(100, 0.05), 80, challenger_ms=2.0)) == {"a"}


@pytest.mark.parametrize("opened", [1, 2, 3])
def test_the_level_is_spent_over_looks_and_tests(opened, looks):
    """The i-th test gets 1 / (i (i + 1)) of the level, each of its looks a fifth of that."""
    _, answers = looks
    ledger, level = Ledger(100, 0.05), 0.05
    race_of(ledger, 80 * (opened - 1))
    share = level / (opened * (opened + 1)) / 5
    answers[5] = share * 1.01
    assert race_of(ledger, 5)[-1] == "a"
    answers[10] = share * 0.99
    assert race_of(ledger, 5)[-1] == "b"
