"""The Plan by itself: grids cover, buffers hold, limits are kept. No simulator needed."""

import re
from dataclasses import replace

import pytest

from mlx_marlin import _ext, codec, kernels, ops
from mlx_marlin.kernels import KernelConfig, Problem, make_name, metal
from mlx_marlin.ops import shaders
from mlx_marlin.ops.problems import native_config
from tests.support import cases, metal_executor
from tests.support.paths import ROOT

KERNELS = ROOT / "kernels"

# (rows, top_k, hidden, intermediate, experts): the case list's smallest, ragged and padded, and real layers.
SIZES = {
    "tiny": (1, 1, 128, 128, 1),
    "ragged": (17, 2, 333, 384, 5),
    "qwen3-30b": (1, 8, 2048, 768, 128),
    "qwen3-30b prefill": (2500, 8, 2048, 768, 128),
    "mixtral": (3, 2, 4096, 14336, 8),
    "many experts": (64, 8, 7168, 2048, 384),
    "many rows": (40000, 8, 2048, 768, 128),
}
TRIPLES = ((3, 3, 3),), ((6, 2, 3),), ((1, 8, 5), (2, 4, 6), (2.5, 3.5, 1.5))


def swiglu(size: str, bits=((3, 3, 3),), dtype="float16", combine=True, bias=False) -> Problem:
    rows, top_k, hidden, intermediate, experts = SIZES[size]
    return Problem.swiglu(
        hidden,
        intermediate,
        rows=rows,
        experts=experts,
        top_k=top_k,
        bits=bits,
        # Half rates exist for mul1 only.
        codebooks=("mcg", "mul1") if any(b % 1 for group in bits for b in group) else "mcg",
        dtype=dtype,
        device="gpu",
        combine=combine,
        bias=bias,
    )


def linear(size: str, bits: float = 3, dtype="float16", bias=False) -> Problem:
    rows, _, hidden, intermediate, _ = SIZES[size]
    return Problem.linear(hidden, intermediate, rows=rows, bits=bits, dtype=dtype, device="gpu", bias=bias)


def mlp(size: str, bits=((2, 3),), dtype="float16", bias=False) -> Problem:
    rows, top_k, hidden, intermediate, experts = SIZES[size]
    options = {"rows": rows, "experts": experts, "top_k": top_k, "dtype": dtype, "combine": True, "bias": bias}
    return Problem.mlp(hidden, intermediate, bits=bits, device="gpu", **options)


PROBLEMS = [swiglu(size, TRIPLES[i % 3], kernels.DTYPES[i % 3], i % 2 == 0, i % 3 == 1) for i, size in enumerate(SIZES)]
PROBLEMS += [
    linear(size, bits, kernels.DTYPES[i % 3], i % 2 == 1)
    for i, (size, bits) in enumerate(zip(SIZES, (1, 2, 2.5, 4, 3.5, 6, 1.5), strict=True))
]
PROBLEMS += [mlp("ragged", ((2.5, 3), (8, 1)), "bfloat16", bias=True), mlp("mixtral"), mlp("qwen3-30b prefill")]

ALL_TILES = [(variant, *tiles) for variant in kernels.VARIANTS for tiles in metal.legal_tiles(variant)]


def config(variant: str, rows: int, columns: int, simdgroups: int, fp32_acc: bool = True) -> KernelConfig:
    return KernelConfig(make_name(variant), rows, columns, simdgroups, fp32_acc, variant)


def tiles_of(problem: Problem) -> list[tuple]:
    """All; for many rows, whose passes take as long as all else here, one of each variant, row count and epilogue."""
    if problem.rows < SIZES["many rows"][0]:
        return ALL_TILES
    return list({t[:3]: t for t in ALL_TILES if t[2] in (64, 128)}.values())


def configs(problem: Problem) -> list[KernelConfig]:
    every = (config(*tiles, fp32_acc) for tiles in tiles_of(problem) for fp32_acc in (True, False))
    return [c for c in every if kernels.feasible(problem, c) is None]


def padded(size: int) -> int:
    return -(-size // 128) * 128


def sizes(problem: Problem, plan: dict) -> dict[str, int]:
    """Bytes of everything that a plan may bind."""
    element = 4 if problem.dtype == "float32" else 2
    k, n, e = padded(problem.hidden), padded(problem.intermediate), problem.experts
    slots = problem.rows * problem.top_k
    out = problem.intermediate if problem.kind == "linear" else problem.hidden
    known = {
        "x": problem.rows * problem.hidden * element,
        "indices": slots * 4,
        "scores": slots * 4,
        "y": (problem.rows if problem.combine else slots) * out * element,
        **plan["scratch"],
    }
    shapes = {name: (n, k) if name == "down" else (k, n) for name in kernels.PROJECTIONS[problem.kind]}
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        known |= {
            f"{name}.codes": int(e * rows * columns * max(group[index] for group in problem.bits) / 8),
            f"{name}.offsets": e * 8,
            f"{name}.formats": e * 4,
            f"{name}.suh": e * rows * 2,
            f"{name}.svh": e * columns * 2,
            f"{name}.bias": e * columns * 4,
        }
    return known


@pytest.mark.parametrize("bits, codes", [(8, 8), (7, 4), (4, 4), (1.5, 4)])
def test_widest_loads_of_what_is_given(bits, codes):
    """What an array must be aligned to, where it is a view that begins inside a buffer."""
    triples = ((bits, bits, bits), (1, 1, 1)) if bits == 8 else ((bits, bits, bits),)
    wanted = {"codes": codes, "suh": 4, "svh": 4, "bias": 8}
    problem = swiglu("ragged", tuple(sorted(triples)), bias=True)
    for tiles in (("decode", 1, 128, 16), ("base", 8, 64, 8)):
        found = [b for d in ops.plan(problem, config(*tiles))["dispatches"] for b in d["buffers"]]
        assert {b["name"].split(".")[-1]: b["alignment"] for b in found if "." in b["name"]}.items() >= wanted.items()
        assert all(b["alignment"] == wanted.get(b["name"].split(".")[-1], 1) for b in found)


def depth(dispatches: list[dict]) -> int:
    """The longest chain of dependent dispatches."""
    stage = []
    for d in dispatches:
        stage.append(1 + max((stage[i] for i in d["after"]), default=0))
    return max(stage, default=0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_limits_and_bounds(problem):
    for chosen in configs(problem):
        plan = ops.plan(problem, chosen)
        known = sizes(problem, plan)
        used = dict.fromkeys(plan["scratch"], 0)
        written = set()
        for d in plan["dispatches"]:
            assert d["threads"][0] * d["threads"][1] * d["threads"][2] <= 1024
            assert d["threads"][0] % 32 == 0, "no partial simdgroup"
            assert d["threadgroup_bytes"] <= 32768 and d["threadgroup_bytes"] % 16 == 0
            assert all(0 < g < 1 << 31 for g in d["grid"])
            slots = [b["slot"] for b in d["buffers"]]
            assert len(set(slots)) == len(slots) and 0 < min(slots) and max(slots) <= 30
            for b in d["buffers"]:
                assert b["bytes"] > 0 and b["offset"] % 4 == 0, b
                assert b["offset"] + b["bytes"] <= known[b["name"]], (b, known[b["name"]])
                if b["name"] in used:
                    used[b["name"]] = max(used[b["name"]], b["offset"] + b["bytes"])
                    assert b["access"] == "w" or b["name"] in written, f"{b['name']} is read before it is written"
                if b["access"] == "w":
                    written.add(b["name"])
        assert used == plan["scratch"], "scratch is exactly what is bound"
        if problem.rows > 64:  # a pass is at least that long
            assert sum(plan["scratch"].values()) < (1 << 27) * 1.5, "passes bound the scratch"


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_passes_cover_y_once_and_columns_are_covered(problem):
    for chosen in configs(problem):
        plan = ops.plan(problem, chosen)
        pieces = sorted((b["offset"], b["bytes"]) for d in plan["dispatches"] for b in d["buffers"] if b["name"] == "y")
        end = 0
        for offset, size in pieces:
            assert offset == end
            end += size
        assert end == sizes(problem, plan)["y"]
        for d in plan["dispatches"]:
            if "<" not in d["kernel"]:
                continue
            gate_up = d["kernel"].startswith("trellis_gate_up")
            wide = problem.kind == "linear" or gate_up
            columns = padded(problem.intermediate) if wide else padded(problem.hidden)
            assert 0 <= d["grid"][0] * chosen.tile_size_n - columns < chosen.tile_size_n


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_feasible_is_what_the_plan_accepts(problem):
    wrong = ("base", 4, 128, 8), ("decode", 1, 80, 8), ("decode", 1, 128, 20), ("decode", 0, 128, 4)
    for tiles in [*tiles_of(problem), *wrong]:
        chosen = config(*tiles)
        reason = kernels.feasible(metal_executor.allowing(problem, chosen), chosen)
        native = native_config(chosen)
        info = _ext.StackInfo(problem.experts, padded(problem.hidden), padded(problem.intermediate), False, 1 << 6, 1)
        back = _ext.StackInfo(problem.experts, padded(problem.intermediate), padded(problem.hidden), False, 1 << 6, 1)

        def make():
            if problem.kind == "linear":
                return _ext.plan_linear(
                    problem.rows, 0, info, problem.hidden, problem.intermediate, 1, False, False, native
                )
            gate = info if problem.kind == "swiglu" else None
            return _ext.plan_swiglu(
                problem.rows, problem.top_k, 0, gate, info, back, problem.hidden, 0, 1.0, 1.0, False, native
            )

        if reason is None:
            assert make()["dispatches"]
        else:
            with pytest.raises(ValueError):
                make()


def test_default_is_feasible_and_first():
    for problem in PROBLEMS:
        assert kernels.feasible(problem, kernels.default(problem)) is None
        assert kernels.candidates(problem)[0] == kernels.default(problem)


def test_one_row_of_qwen3_has_three_stages():
    plan = ops.plan(swiglu("qwen3-30b"))
    stems = [d["kernel"].split("<")[0] for d in plan["dispatches"]]
    assert stems == ["trellis_gate_up", "trellis_linear", "trellis_combine"]
    assert depth(plan["dispatches"]) == 3


@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("columns", [32, 48, 64, 96, 128, 160, 256])
def test_every_decode_config_of_one_row_has_three_stages(columns, fp32_acc):
    for simdgroups in metal.SIMDGROUPS:
        plan = ops.plan(swiglu("qwen3-30b"), config("decode", 1, columns, simdgroups, fp32_acc))
        assert len(plan["dispatches"]) == 3 and depth(plan["dispatches"]) == 3


def test_wide_layers_rotate_in_a_dispatch_of_their_own():
    """Two rotated copies of 4096 floats would leave one threadgroup per core of an M1; as halves they fit."""
    problem = replace(swiglu("qwen3-30b"), hidden=4096)
    for fp32_acc, stems in (True, ["rotate", "gate_up"]), (False, ["gate_up", "linear"]):
        plan = ops.plan(problem, config("decode", 1, 128, 8, fp32_acc))
        found = [d["kernel"].split("<")[0].removeprefix("trellis_") for d in plan["dispatches"]]
        assert found[:2] == stems
        assert all(d["threadgroup_bytes"] <= 20 * 1024 for d in plan["dispatches"])


def test_halves_halve_the_rotated_activations():
    problem = replace(swiglu("qwen3-30b"), rows=64)
    floats, halves = (
        ops.plan(problem, config("base", 16, 128, 16, fp32_acc))["scratch"]["rotated"] for fp32_acc in (True, False)
    )
    assert halves / floats == 1 / 2 + 1 / 128  # a float per 128 halves


def test_one_row_of_qwen3_reads_little_beside_the_weights():
    problem = swiglu("qwen3-30b")
    plan = ops.plan(problem)
    read = {}
    for d in plan["dispatches"]:
        for b in d["buffers"]:
            # Of the stacked arrays, the experts that one row uses.
            share = problem.top_k / problem.experts if "." in b["name"] else 1
            read[b["name"]] = max(read.get(b["name"], 0), b["bytes"] * share)
    codes = sum(size for name, size in read.items() if name.endswith(".codes"))
    assert codes == 8 * 3 * 2048 * 768 * 3 / 8
    assert sum(read.values()) - codes <= 0.03 * codes


def test_dependencies_follow_the_data():
    plan = ops.plan(swiglu("qwen3-30b prefill"))
    first = plan["dispatches"][:5]
    assert [d["kernel"].split("<")[0].removeprefix("trellis_") for d in first] == [
        "route",
        "rotate",
        "gate_up",
        "linear",
        "combine",
    ]
    assert [d["after"] for d in first] == [[], [0], [0, 1], [0, 2], [3]]


def test_constants_are_the_widths_and_codebooks_present():
    plan = ops.plan(swiglu("qwen3-30b", bits=((6, 2, 3),)), "moe_trellis_swiglu_decode_6_2_3")
    gate_up, down, _ = plan["dispatches"]
    assert gate_up["constants"]["widths"] == 1 << 2 * 6 | 1 << 2 * 2
    assert down["constants"]["widths"] == 1 << 2 * 3
    assert gate_up["constants"]["codebooks"] == 1 << codec.CODEBOOKS.index("mcg")
    gate_up, down, _ = ops.plan(swiglu("qwen3-30b", bits=((2.5, 1.5, 3.5), (8, 1, 3))))["dispatches"]
    assert gate_up["constants"]["widths"] == 1 << 5 | 1 << 16 | 1 << 3 | 1 << 2
    assert down["constants"]["widths"] == 1 << 7 | 1 << 6
    up, down, _ = ops.plan(mlp("qwen3-30b", bits=((2.5, 3.5), (8, 3))))["dispatches"]
    assert up["constants"]["widths"] == 1 << 5 | 1 << 16 and down["constants"]["widths"] == 1 << 7 | 1 << 6


def test_experts_without_a_gate_read_no_second_projection():
    problem = mlp("qwen3-30b prefill", bias=True)
    for chosen in configs(problem)[::5]:
        plan = ops.plan(problem, chosen)
        assert not any(b["name"].startswith("gate") for d in plan["dispatches"] for b in d["buffers"])
        gated = ops.plan(replace(problem, kind="swiglu", bits=((2, 2, 3),)), chosen)
        for name in ("rotated", "sums"):
            if name in plan["scratch"] and len(gated["dispatches"]) == len(plan["dispatches"]):
                assert 2 * plan["scratch"][name] == gated["scratch"][name], (name, chosen)


def test_no_rows_need_no_dispatch():
    problem = Problem.linear(128, 128, rows=0, bits=3, codebooks="mcg", dtype="float32", device="gpu")
    assert ops.plan(problem) == {"dispatches": [], "scratch": {}}


@pytest.mark.parametrize(
    "wrong", [{"rows": -1}, {"top_k": 0}, {"hidden": 0}, {"intermediate": -128}, {"experts": 0}], ids=str
)
def test_sizes_that_no_call_has_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ops.plan(replace(swiglu("tiny"), **wrong), config("decode", 1, 16, 4))


def test_a_cpu_problem_is_refused():
    with pytest.raises(ValueError, match="device is 'cpu'"):
        ops.plan(cases.Case(3, "mcg", "float32", 1, "block", "none").problem("cpu"))


def test_constants_and_kernels_exist_in_the_sources():
    text = (KERNELS / "args.h").read_text()
    names = set(re.findall(r"X\(\d+, \w+, (\w+)\)", text)) | set(re.findall(r"X\((\w+)\)", text))
    assert set(_ext.SOURCE_CONSTANTS) <= names
    texts = shaders.sources(ops.SHADERS)
    for problem in PROBLEMS:
        for chosen in configs(problem)[::7]:
            for d in ops.plan(problem, chosen)["dispatches"]:
                assert set(d["constants"]) <= names
                function = d["kernel"].split("<")[0]
                found = re.search(rf"\[\[kernel.*\]\] void {function}\(", texts[function.removeprefix("trellis_")])
                # Apple's compiler gives wrong values where a kernel states one simdgroup (cubecl's pull request 1636).
                assert found and ("max_total_threads" not in found[0] or d["threads"][0] > 32)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_accesses_are_what_the_kernels_declare(problem):
    """MLX places barriers by what a plan says of each buffer: const ones are read, the others written."""
    texts = shaders.sources(ops.SHADERS)
    for chosen in configs(problem)[::5]:
        for d in ops.plan(problem, chosen)["dispatches"]:
            function = d["kernel"].split("<")[0]
            (arguments,) = re.findall(rf"void {function}\((.*?)\) \{{", texts[function.removeprefix("trellis_")], re.S)
            declared = re.findall(r"device (const )?\w+\* \w+ \[\[buffer\((\d+)\)?", arguments)
            access = {int(slot): "r" if const else "w" for const, slot in declared}
            assert len(access) == arguments.count("device ")
            for b in d["buffers"]:
                assert b["access"] == access[b["slot"]], (d["kernel"], b)


def test_installed_sources_are_self_contained():
    for stem, text in shaders.sources(ops.SHADERS).items():
        assert '#include "' not in text and "#pragma once" not in text, stem
        assert text.isascii() and text.count("MLX_MARLIN_ARGS_H\n#define") == 1


def test_a_missing_source_is_named():
    with pytest.raises(RuntimeError, match="lost.h is missing"):
        shaders.flatten("a.metal", {"a.metal": '#include "lost.h"\n'})
