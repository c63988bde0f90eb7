"""The self-test: a wrong kernel is refused before it serves a layer, and the next one is taken."""

import json
import warnings
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_marlin import _ext, codec, kernels, ops
from mlx_marlin.selection import choices, selftest, small_cases
from tests.support.paths import ROOT
from tests.support.planted import PLANTED, PLANTED_HALF_RATES
from tests.support.planted_runs import (
    BUILD_ERROR,
    GATHERED,
    LINEAR,
    MLP,
    SWIGLU,
    Planted,
    halved,
    last_row_of_nan,
    not_compiled,
    not_run,
    one_column,
    right,
    self_test,
)


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(choices, "_choices", choices._Choices())
    monkeypatch.setattr(choices.profile, "find", lambda problem: None)  # there is no GPU to look up here


@pytest.mark.parametrize(
    "problem",
    [
        SWIGLU,
        replace(SWIGLU, combine=True, bias=True, activation="swiglu_oai"),
        LINEAR,
        GATHERED,
        replace(GATHERED, rows=1, bias=True),
        replace(SWIGLU, activation="gelu_tanh", dtype="float16"),
        replace(SWIGLU, dtype="bfloat16"),
        MLP,
        replace(MLP, combine=True, bias=True, activation="gelu_tanh", rows=20),
    ],
)
def test_right_kernels_pass(tmp_path, problem):
    executor = Planted(lambda config: False, halved)
    test = self_test(tmp_path, executor)
    choice, known = test.select(problem)
    assert choice.config == kernels.default(problem) and known
    assert test.select(problem) == (choice, True)
    assert executor.runs == len(list(selftest._tests(problem, choice.config)))


@pytest.mark.parametrize("spoil", [one_column, last_row_of_nan, halved, not_compiled, not_run])
@pytest.mark.parametrize("problem", [SWIGLU, LINEAR, GATHERED])
def test_a_wrong_kernel_is_refused(tmp_path, problem, spoil):
    wrong = kernels.default(problem)
    test = self_test(tmp_path, Planted(lambda config: config == wrong, spoil))
    with pytest.warns(RuntimeWarning, match=wrong.kernel_name) as warned:
        choice, _ = test.select(problem)
    assert choice.config != wrong
    assert kernels.feasible(problem, choice.config) is None
    assert "refused" in choice.reason and choices.choose(problem) == choice
    assert str(choice.config) in str(warned[0].message)


@pytest.fixture
def few_candidates(monkeypatch):
    """Of the hundreds those with two widths and two numbers of simdgroups."""
    real = kernels.candidates

    def candidates(problem):
        return [c for c in real(problem) if c.tile_size_n in (64, 128) and c.simdgroups in (8, 16)]

    monkeypatch.setattr(kernels, "candidates", candidates)


def test_no_right_kernel_is_an_error(tmp_path, few_candidates):
    few = replace(LINEAR, rows=1)
    test = self_test(tmp_path, Planted(lambda config: True, halved))
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="Run the layer on the CPU"):
        test.select(few)


# Many rows, so that the default is a matrix kernel.
MANY = replace(SWIGLU, rows=64)


def variants_tried(tmp_path, problem, is_wrong, spoil) -> list:
    """Configs that run until one is right, or none is left."""
    tried = []
    executor = Planted(lambda config: tried.append(config) or is_wrong(config), spoil)
    with pytest.warns(RuntimeWarning) as warned:
        try:
            self_test(tmp_path, executor).select(problem)
        except RuntimeError:
            pass
    assert len(warned) == 1
    return list(dict.fromkeys(tried))


def test_a_variant_that_cannot_be_built_gives_way_to_prefill4(tmp_path):
    first, second, third = variants_tried(tmp_path, MANY, lambda c: c.kernel_variant == "base", not_compiled)
    assert first.kernel_variant == second.kernel_variant == "base" and first != second
    assert third.kernel_variant == "prefill4"
    assert first.use_fp32_acc and second.use_fp32_acc and third.use_fp32_acc


def test_other_tiles_of_a_wrong_variant_come_before_prefill4_and_that_before_the_rest(tmp_path, few_candidates):
    def is_wrong(config):
        return config.kernel_variant in ("large_batch", "prefill4") and config.use_fp32_acc

    tried = variants_tried(tmp_path, replace(MANY, rows=512), is_wrong, halved)
    assert list(dict.fromkeys(c.kernel_variant for c in tried))[:2] == ["large_batch", "prefill4"]
    assert tried[-1].kernel_variant in ("decode", "base") and tried[-1].use_fp32_acc
    assert set(filter(is_wrong, kernels.candidates(MANY))) == set(tried[:-1])


def test_three_builds_that_fail_are_enough(tmp_path):
    executor = Planted(lambda config: True, not_compiled)
    test = self_test(tmp_path, executor)
    with pytest.warns(RuntimeWarning, match="is refused on this GPU") as warned:
        with pytest.raises(RuntimeError, match="3 kernels for .* could not be built.*error: no such type") as raised:
            test.select(MANY)
    assert len(warned) == 1 and executor.runs == 3
    assert BUILD_ERROR in str(warned[0].message) and BUILD_ERROR in str(raised.value), "the errors arrive whole"
    assert "on the CPU" in str(raised.value)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="could not be built"):
        warnings.simplefilter("error")
        test.select(MANY)
    assert executor.runs == 3


def test_an_error_of_any_length_arrives_whole(tmp_path):
    long = BUILD_ERROR + "\na.metal:9:9: error: " + "x" * 5000

    def spoil(y):
        raise RuntimeError(long)

    assert long in self_test(tmp_path, Planted(lambda config: True, spoil)).fault(LINEAR, kernels.default(LINEAR))


def test_the_self_test_knows_what_the_encoder_says():
    assert f" {selftest._NOT_BUILT}: " in (ROOT / "csrc" / "metal" / "encode.cpp").read_text()
    assert selftest._NOT_BUILT in BUILD_ERROR


def test_build_errors():
    """A compiler's output without its warnings."""
    text = "warning: a\n int b;\n ^\nx.metal:3:1: error: c\n int d;\n ^\nnote: e\n f\nerror: g\nerror: h\n i\n"
    assert _ext.build_errors(text) == "x.metal:3:1: error: c\n int d;\n ^\nerror: g\nerror: h\n i"
    for whole in ("", "XPC_ERROR_CONNECTION_INTERRUPTED", "two\nlines\n"):
        assert _ext.build_errors(whole) == whole


def test_verdicts_are_kept(tmp_path):
    wrong = kernels.default(SWIGLU)
    first = Planted(lambda config: config == wrong, halved)
    with pytest.warns(RuntimeWarning):
        chosen = self_test(tmp_path, first).select(SWIGLU)[0].config
    choices._choices = choices._Choices()
    again = Planted(lambda config: False, halved)
    with pytest.warns(RuntimeWarning):
        assert self_test(tmp_path, again).select(SWIGLU)[0].config == chosen
    assert (first.runs, again.runs) == (2, 0)


@pytest.mark.parametrize("change", [{"machine": {"kernels": "other"}}, {"verdicts": [1]}, {"verdicts": {"a": 1}}, None])
def test_foreign_or_malformed_verdicts_are_not_believed(tmp_path, change):
    self_test(tmp_path, right).select(LINEAR)
    path = tmp_path / "verdicts.json"
    stored = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(stored | change))
    executor = Planted(lambda config: False, halved)
    self_test(tmp_path, executor).select(LINEAR)
    assert executor.runs == 1


def test_a_read_only_disk_costs_a_repeat(tmp_path):
    (tmp_path / "file").write_text("")
    executor = Planted(lambda config: False, halved)
    for runs in (1, 2):
        test = selftest.SelfTest("cpu", executor, tmp_path / "file" / "verdicts.json")
        test.select(LINEAR)
        test.select(LINEAR)
        assert executor.runs == runs


def test_nothing_runs_in_a_trace(tmp_path, monkeypatch):
    executor = Planted(lambda config: False, halved)
    test = self_test(tmp_path, executor)
    monkeypatch.setattr(selftest, "_gpu", lambda: test)
    assert selftest.select(LINEAR, traced=True)[1] is False
    assert executor.runs == 0
    assert selftest.select(LINEAR, traced=False)[1] is True
    assert selftest.select(LINEAR, traced=True)[1] is True
    assert executor.runs == 1


def test_a_trace_takes_the_config_that_an_earlier_call_found(tmp_path, monkeypatch):
    """What cannot be built is used by a trace that comes first; the encoder's error then names it."""
    executor = Planted(lambda config: config == kernels.default(LINEAR), not_compiled)
    test = self_test(tmp_path, executor)
    monkeypatch.setattr(selftest, "_gpu", lambda: test)
    untested = selftest.select(LINEAR, traced=True)
    assert (untested[0].config, untested[1]) == (kernels.default(LINEAR), False)
    with pytest.warns(RuntimeWarning, match="could not be built"):
        found = selftest.select(LINEAR, traced=False)
    assert found[0].config != kernels.default(LINEAR) and found[1]
    assert selftest.select(LINEAR, traced=True) == found
    runs = executor.runs
    # Another number of rows runs the same kernels: known to be wrong, and nothing may be run to look for others.
    others = (replace(LINEAR, rows=rows) for rows in (3, 5, 6, 8))
    other = next(problem for problem in others if test.known(problem, kernels.default(LINEAR)))
    choices.set_feedback(other, kernels.default(LINEAR))
    with pytest.warns(RuntimeWarning):
        choice, known = selftest.select(other, traced=True)
    assert choice.config != kernels.default(LINEAR) and executor.runs == runs
    assert known == test.known(other, choice.config)


def test_tracing_is_seen():
    seen = []

    def f(x):
        seen.append(ops.is_traced(x))
        return x + 1

    x = mx.ones(3)
    f(x)
    mx.compile(f)(x)
    mx.vjp(f, [x], [x])
    assert seen == [False, True, True]


def test_the_cpu_is_not_tested():
    problem = replace(LINEAR, device="cpu")
    assert selftest.select(problem, traced=False) == (choices.choose(problem), True)


def test_a_wrong_sort_is_refused_once_for_all_configs(tmp_path):
    """Whose own small case is right: more slots than there are threads come wrong."""
    runs = []

    def execute(problem, config, case):
        runs.append(problem.experts)
        y = right(problem, config, case)
        return halved(y) if problem.experts > 512 else y

    test = self_test(tmp_path, execute)
    one, other = (
        kernels.KernelConfig("moe_trellis_swiglu_prefill4", 4, columns, 8, True, "prefill4") for columns in (64, 128)
    )
    assert "error against the codec" in test.fault(GATHERED, one)
    assert "error against the codec" in test.fault(GATHERED, other)
    assert len(runs) == 4  # the config's own case, twice; the sorts once


def test_kernels_that_no_config_chooses_are_tested(tmp_path):
    wrong = set()

    def execute(problem, config, case):
        y = small_cases.expected(problem, case)
        return y + 1e-3 * (case.get("of") in wrong)

    test = self_test(tmp_path, execute)
    assert test.others() == {}
    wrong.add("weight")
    assert len(test.others()) == len(codec.WIDTHS) + 2 * codec.MAX_BITS
    wrong.symmetric_difference_update({"weight", "gradient"})
    assert len(test.others()) == 2
    wrong.symmetric_difference_update({"gradient", "embedding"})
    assert len(test.others()) == codec.MAX_BITS


def test_a_config_without_a_small_case_is_refused(tmp_path, monkeypatch):
    wrong = kernels.default(LINEAR)
    real = small_cases.small_problem

    def small_problem(problem, config):
        if config == wrong:
            raise small_cases.NoSmallCase("no small problem")
        return real(problem, config)

    monkeypatch.setattr(small_cases, "small_problem", small_problem)
    with pytest.warns(RuntimeWarning, match="cannot be tested: no small problem"):
        assert self_test(tmp_path, right).select(LINEAR)[0].config != wrong


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_gathered_products_are_tested_as_such(rows):
    """A verdict on a linear is none on one projection of experts: rows are routed and indexed there."""
    problem = replace(GATHERED, rows=rows)
    config = kernels.default(problem)
    small = small_cases.small_problem(problem, config)
    assert small.experts >= 3 and small.bits == problem.bits
    alone = replace(problem, experts=1, bits=((2,),))
    assert selftest._key(problem, config) != selftest._key(alone, config)
    plan = ops.plan(small, config)["dispatches"]
    assert any(b["name"] == "indices" for d in plan for b in d["buffers"])


def test_a_call_without_rows_says_nothing_about_kernels(tmp_path, monkeypatch):
    executor = Planted(lambda config: True, halved)
    test = self_test(tmp_path, executor)
    monkeypatch.setattr(selftest, "_gpu", lambda: test)
    empty = replace(SWIGLU, rows=0)
    assert selftest.select(empty, traced=False) == (choices.choose(empty), True)
    assert executor.runs == 0 and not (tmp_path / "verdicts.json").exists()


@pytest.mark.parametrize("rows", [1, 64])
def test_several_rows_are_tested_whatever_the_call_has(tmp_path, rows):
    problem = replace(SWIGLU, rows=rows)
    config = kernels.KernelConfig("moe_trellis_swiglu", 8, 128, 16, True, "base")
    spoiled = []

    def last_row(y):
        spoiled.append(len(y))
        y[-1] *= 1.1
        return y

    assert "error against the codec" in self_test(tmp_path, Planted(lambda config: True, last_row)).fault(
        problem, config
    )
    assert spoiled == [9]


def test_what_does_not_run_is_tried_again_by_the_next_process(tmp_path):
    wrong = kernels.default(LINEAR)
    with pytest.warns(RuntimeWarning, match="does not run"):
        self_test(tmp_path, Planted(lambda config: config == wrong, not_compiled)).select(LINEAR)
    choices._choices = choices._Choices()
    assert self_test(tmp_path, Planted(lambda config: False, halved)).select(LINEAR)[0].config == wrong


@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("name", {**PLANTED, **PLANTED_HALF_RATES})
def test_planted_decoders_are_refused(tmp_path, monkeypatch, name, dtype, fp32_acc):
    """What the codec's own tests reject, on the rows that the self-test takes."""
    what, replacement, codebooks = {**PLANTED, **PLANTED_HALF_RATES}[name]
    bits = ((2.5,),) if name in PLANTED_HALF_RATES else LINEAR.bits
    problem = replace(LINEAR, bits=bits, codebooks=(codebooks[-1],), dtype=dtype, accuracy="half")
    config = replace(kernels.default(problem), use_fp32_acc=fp32_acc)
    assert self_test(tmp_path, right).fault(problem, config) is None

    def wrong(problem, config, case):
        with monkeypatch.context() as patch:
            patch.setattr(codec.trellis, what, replacement)
            return small_cases.expected(problem, case)

    (tmp_path / "verdicts.json").unlink()
    assert "error against the codec" in self_test(tmp_path, wrong).fault(problem, config)
