"""What the selector accepts, and how it explains what it does not."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import selection
from mlx_marlin.selection.selector import MixedKernelSelector

DECODE, BASE = "moe_trellis_swiglu_decode", "moe_trellis_swiglu"
MIXED = [2, 2, 3, 4]


@pytest.fixture
def selector():
    return MixedKernelSelector(exploration_rate=0.0)


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (dict(batch_size=1.5), "batch_size"),
        (dict(active_expert_bits=[2, 9]), "active_expert_bits"),
        (dict(gpu_memory_pressure=1.1), "gpu_memory_pressure must be a number in"),
        (dict(gpu_memory_pressure=math.nan), "gpu_memory_pressure"),
        (dict(gate_bits=6, up_bits=0, down_bits=2), "up_bits must be one of"),
        (dict(available_kernels=set()), "available_kernels is empty"),
        (dict(available_kernels=BASE), "available_kernels must be a set"),
        (dict(available_kernels={"my_kernel"}), "no kernel is called 'my_kernel'"),
        (dict(batch_size=4, pattern={"top_expert_share": 2}), "top_expert_share"),
    ],
)
def test_bad_arguments_are_explained(selector, call, words):
    with pytest.raises(ValueError, match=words):
        selector.select_kernel(**{"batch_size": 1, "active_expert_bits": MIXED} | call)
    assert selector.get_statistics()["total_selections"] == 0


@pytest.mark.parametrize(
    "name, rows, latency",
    [("nothing", 1, 1.0), (BASE, 0, 1.0), (BASE, 1, 0.0), (BASE, 1, math.inf), (BASE, 1, "1")],
)
def test_bad_latencies_are_refused(selector, name, rows, latency):
    with pytest.raises(ValueError):
        selector.record_latency(name, rows, latency)
    assert selector.get_statistics()["tracked_kernels"] == 0


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, "0.1", None])
def test_the_exploration_rate_is_a_share(selector, rate):
    with pytest.raises(ValueError, match="exploration"):
        selector.set_exploration_rate(rate)
    with pytest.raises(ValueError, match="exploration"):
        selection.set_exploration_rate(rate)
    with pytest.raises(ValueError, match="exploration_rate"):
        MixedKernelSelector(exploration_rate=rate)
    assert selector.exploration_rate == 0.0


def test_a_history_must_hold_a_look():
    with pytest.raises(ValueError, match="history_len must be an integer >= 5"):
        MixedKernelSelector(history_len=4)


@pytest.mark.parametrize(
    "bits", [mx.array([2, 2, 3, 4]), mx.array([2, 3], mx.uint32), np.array([2, 2, 3, 4]), (2, 3), mx.array([2.0, 3.0])]
)
def test_active_bits_may_be_arrays(selector, bits):
    assert selector.select_kernel(1, bits)[0] == DECODE
    assert selector.select_kernel(1, bits)[1]["family"] == ("mixed_bpw" if len(bits) == 4 else "standard")


@pytest.mark.parametrize("bits", [mx.array([2.25, 3.0]), mx.array([[2, 3]]), mx.array(2.25), "23", [2, 9], None])
def test_active_bits_that_are_no_list_of_widths(selector, bits):
    with pytest.raises(ValueError, match="active_expert_bits must be one of 1, 1.5, 2, .*, got"):
        selector.select_kernel(1, bits)
