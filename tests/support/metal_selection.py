"""The quick tests' selection of cases and configs of the Metal kernels."""

from __future__ import annotations

from collections import Counter

from mlx_marlin import codec, kernels
from mlx_marlin.kernels import KernelConfig, make_name
from tests.support import cases
from tests.support.covering import covering_array

# (tile_size_m, tile_size_n, simdgroups) by variant and what it runs on, prologue and epilogue. At the sizes of the
# cases a product makes its own input (rotates x, or activates sums of gate and up) where its variant is decode and it
# has more than 16 columns; it finishes its output where these are whole Hadamard blocks.
TILES = {
    ("decode", "fused", "fused"): [(1, 128, 16), (1, 128, 4), (2, 128, 8), (3, 128, 12), (1, 128, 8)],
    ("decode", "fused", "separate"): [(1, 32, 4), (2, 64, 8), (3, 48, 4), (1, 96, 12)],
    ("decode", "separate", "separate"): [(1, 16, 8), (2, 16, 4)],
    ("prefill4", "separate", "fused"): [(4, 128, 16), (4, 128, 8)],
    ("prefill4", "separate", "separate"): [(4, 64, 16), (4, 16, 4), (4, 96, 8)],
    ("base", "separate", "fused"): [(8, 128, 8), (16, 128, 16)],
    ("base", "separate", "separate"): [(8, 64, 4), (16, 48, 12), (8, 96, 16)],
    ("large_batch", "separate", "fused"): [(64, 128, 16)],
    ("base on accelerators", "separate", "fused"): [(32, 128, 16), (32, 128, 8)],
    ("base on accelerators", "separate", "separate"): [(32, 64, 4), (32, 96, 12), (32, 32, 8)],
    ("large_batch on accelerators", "separate", "fused"): [(48, 128, 16), (48, 128, 8)],
}


def variant_of(key: tuple[str, str, str]) -> str:
    return key[0].split()[0]


def config(variant: str, rows: int, columns: int, simdgroups: int, fp32_acc: bool = True) -> KernelConfig:
    variant = variant.split()[0]
    return KernelConfig(make_name(variant), rows, columns, simdgroups, fp32_acc, variant)


def tile(config: KernelConfig) -> tuple[int, int, int]:
    return config.tile_size_m, config.tile_size_n, config.simdgroups


def key_of(config: KernelConfig) -> tuple[str, str, str]:
    """Variant and what it runs on, prologue and epilogue of one of the configs."""
    return next(k for k, tiles in TILES.items() if variant_of(k) == config.kernel_variant and tile(config) in tiles)


# Every pair of these occurs in the selection; what else there is goes round.
AXES = {
    "kernel": ("linear", "experts", "combined experts"),
    "variant": tuple(dict.fromkeys(key[0] for key in TILES)),
    "prologue": ("fused", "separate"),
    "epilogue": ("fused", "separate"),
    "sums": ("float", "half"),
    "bits": cases.AXES["bits"],
    "codebook": codec.CODEBOOKS,
    "dtype": kernels.DTYPES,
    "rows": (1, 3, 5, 17, 64),
}


# The experts of each variant's cases in turn. A kernel with every width and codebook takes ten times as long to compile
# as one with a single format, so that few have both.
MIXES = ("uniform", "both", "uniform", "bits", "uniform", "codebooks")


# With a gate and without, in turn.
ACTIVATIONS = (
    *("silu", "mlp_relu_squared", "gelu_tanh", "mlp_silu", "swiglu_oai", "mlp_gelu_tanh", "relu_squared"),
    *("swiglu_clamped", "swiglu_step", "situ"),
)


def legal(values: dict) -> bool:
    if (values.get("bits", 1), values.get("codebook", "mul1")) not in cases.FORMATS:
        return False
    known = ("variant", "prologue", "epilogue")
    return any(all(values.get(name, value) == value for name, value in zip(known, key)) for key in TILES)


def selection() -> list:
    """Pairs of a case and a config."""
    chosen, turns, mixed, fused, met = [], Counter(), Counter(), Counter(), set()
    for i, row in enumerate(covering_array(AXES, legal)):
        key = row["variant"], row["prologue"], row["epilogue"]
        sizes = TILES[key][turns[key] % len(TILES[key])]
        turns[key] += 1
        linear = row["kernel"] == "linear"
        turn = MIXES[mixed[row["variant"]] % len(MIXES)]
        # A half rate brings its codebook with it; the mix that it cannot have waits for the next case.
        mix = turn if cases.legal({"bits": row["bits"], "codebook": row["codebook"], "mix": turn}) else "bits"
        dims = list(cases.DIMS)[i % len(cases.DIMS)]
        options = (
            {}
            if linear
            else {
                "mix": mix,
                "top_k": (1, 2, 5)[i % 3],
                "scores": row["kernel"] == "combined experts",
                "routing": "one_expert" if i % 7 == 3 else "random",
            }
        )
        case = cases.Case(
            row["bits"],
            row["codebook"],
            row["dtype"],
            row["rows"],
            dims,
            "none" if linear else ACTIVATIONS[(fused[key] + list(TILES).index(key)) % len(ACTIVATIONS)],
            bias=i % 4 == 1,
            **options,
        )
        fused[key] += not linear
        met |= set() if linear else {(key, case.gated)}
        mixed[row["variant"]] += not linear and mix == turn
        chosen.append((case, config(row["variant"], *sizes, row["sums"] == "float")))
    for key in TILES:
        for activation in ACTIVATIONS[:2]:
            case = cases.Case(3, "mcg", "float16", 5, "blocks", activation, top_k=2)
            if (key, case.gated) not in met:
                chosen.append((case, config(key[0], *TILES[key][0])))
    left = [(key[0], *sizes) for key, tiles in TILES.items() for sizes in tiles[turns[key] :]]
    return chosen + [(case, config(*one)) for (case, _), one in zip(chosen, left)]
