"""Every barrier of the Metal kernels is needed, and the simulator notices each one that is missing or too
weak. Wrong decoders of half rates are noticed by every case that has one.

A mutant is the shader folder with one barrier, or the decoder, changed. Some probe must fail on a barrier's, and then
in every schedule.
"""

import re
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from mlx_marlin import codec, ops
from tests import metal_sim
from tests.metal.test_kernels import config
from tests.support import cases, metal_executor
from tests.support.metal_backends import Simulated, run

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

BARRIER = re.compile(r"\b(threadgroup|simdgroup)_barrier\(([^)]*)\);")
ORDERS = ("forward", "reverse", "random:7")

SWIGLU = cases.Case(3, "mcg", "float16", 3, "blocks", "silu", top_k=2, scores=True)
MANY_ROWS = cases.Case(2, "3inst", "float32", 40, "blocks", "silu", top_k=2, routing="one_expert")
LINEAR = cases.Case(3, "mcg", "float16", 3, "blocks", "none")
# Between them they reach every barrier: fused and separate prologues and epilogues, row and matrix products with one
# and with several units of rows, with and without a product for every simdgroup, routed and unrouted rows.
PROBES = {
    "fused row products": (SWIGLU, config("decode", 1, 128, 16)),
    "separate row products": (SWIGLU, config("decode", 1, 64, 8)),
    "fused linear": (LINEAR, config("decode", 1, 128, 16)),
    "separate linear": (LINEAR, config("decode", 1, 32, 4)),
    "routed rows": (MANY_ROWS, config("prefill4", 4, 128, 16)),
    "matrix products": (MANY_ROWS, config("base", 16, 128, 16)),
    "large batch": (MANY_ROWS, config("large_batch", 64, 128, 16)),
    "half operands": (SWIGLU, config("decode", 1, 64, 8, False)),
    "idle simdgroups": (MANY_ROWS, config("base", 8, 48, 12)),
    "search": None,  # at 6 bits, which lanes share
}
# The probe to try first.
LIKELY = {"linear.metal": "fused linear", "route.metal": "routed rows", "product.h": "matrix products"}
LIKELY |= {"viterbi.metal": "search", "traceback.metal": "search"}


@dataclass(frozen=True)
class Site:
    """A barrier: the file, its place among the file's barriers, and its line."""

    file: str
    number: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def _sites() -> list[Site]:
    found = []
    for path in sorted(metal_executor.SHADERS.glob("*.*")):
        text = path.read_text()
        for number, match in enumerate(BARRIER.finditer(text)):
            found.append(Site(path.name, number, text[: match.start()].count("\n") + 1))
    return found


SITES = _sites()
# A quick run takes the first barrier of every file, a full one all.
EACH = [pytest.param(s, id=str(s), marks=[pytest.mark.slow] if s.number else []) for s in SITES]


def mutate(site: Site, folder, replacement: str):
    """The shaders in a new folder, with one barrier replaced."""
    shutil.copytree(metal_executor.SHADERS, folder)
    text = (folder / site.file).read_text()
    match = list(BARRIER.finditer(text))[site.number]
    (folder / site.file).write_text(text[: match.start()] + match.expand(replacement) + text[match.end() :])
    return folder


def findings(folder, probes, order: str) -> dict[str, str]:
    """What the simulator reports, by probe."""
    found = {}
    for name in probes:
        probe = PROBES[name]
        try:
            if probe is None:
                metal_executor.viterbi(
                    np.zeros((1, codec.TILE_SIZE), np.float32), 6, "mcg", directory=folder, order=order
                )
            else:
                case, chosen = probe
                run(Simulated, case, case.inputs(), chosen, directory=folder, order=order)
        except metal_sim.KernelError as error:
            found[name] = str(error)
    return found


def assert_noticed(site: Site, folder) -> None:
    first = {}
    for name in sorted(PROBES, key=lambda name: name != LIKELY.get(site.file)):
        first = findings(folder, [name], ORDERS[0])
        if first:
            break
    assert first, "no probe noticed"
    assert all("data race" in message for message in first.values()), first
    for order in ORDERS[1:]:
        assert findings(folder, first, order), f"not noticed in the order {order}"


@pytest.mark.parametrize("site", EACH)
def test_a_missing_barrier_is_noticed(site, tmp_path):
    assert_noticed(site, mutate(site, tmp_path / "kernels", ";"))


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_barrier_that_orders_nothing_is_noticed(site, tmp_path):
    assert_noticed(site, mutate(site, tmp_path / "kernels", r"\1_barrier(mem_flags::mem_none);"))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_unchanged_kernels_pass(order):
    assert findings(metal_executor.SHADERS, PROBES, order) == {}


def test_a_barrier_that_idle_simdgroups_skip_is_noticed(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(metal_executor.SHADERS, folder)
    text = (folder / "product.h").read_text()
    store = "product.store(sums + simdgroup * items.item_sums(), unit);\n"
    outside = f"{store}    }}\n    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    assert outside in text
    inside = f"{store}    threadgroup_barrier(mem_flags::mem_threadgroup);\n    }}\n"
    (folder / "product.h").write_text(text.replace(outside, inside))
    for order in ORDERS:
        (found,) = findings(folder, ["idle simdgroups"], order).values()
        assert "barrier" in found


def test_there_are_barriers_to_remove():
    text = "".join(path.read_text() for path in metal_executor.SHADERS.glob("*.*"))
    assert len(SITES) == text.count("_barrier(") > 0


# What is replaced in trellis.h, all of it wrong for half rates only.
HALF_RATES = {
    "odd positions first": {"(C + 1) * H / 2": "((C + 1) * H + 1) / 2", "= C * H / 2": "= (C * H + 1) / 2"},
    "floored rate": {"run<H, Codebook>": "run<H / 2 * 2, Codebook>"},
    "moved by 8 only": {"H % 2 == 0 ? even : j & 1": "true ? even : j & 1"},
}


@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
@pytest.mark.parametrize("name", HALF_RATES)
def test_a_wrong_decoder_of_half_rates_is_noticed(name, bits, tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(metal_executor.SHADERS, folder)
    text = (folder / "trellis.h").read_text()
    for right, wrong in HALF_RATES[name].items():
        assert right in text
        text = text.replace(right, wrong)
    (folder / "trellis.h").write_text(text)
    case = cases.Case(bits, "mul1", "bfloat16", 3, "block", "none")
    w = ops.prepare_weight("test", case.weight())
    assert not np.array_equal(Simulated.decode(w, directory=folder), codec.inner(case.weight()))
    inputs = case.inputs()
    # Products take their codes from the decoder that was just compared: one of the two forms each.
    chosen = None if bits == 2.5 else config("base", 8, 64, 4)
    y = run(Simulated, case, inputs, chosen, directory=folder)
    assert cases.row_error(y, case.reference(*inputs)) > 0.1 > case.tolerance
