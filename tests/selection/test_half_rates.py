"""Half rates are ordinary widths: in names, problems, candidates, profiles, selection and reports."""

import json
from itertools import product

import numpy as np
import pytest

from mlx_marlin import MixedBPWAutoTuner, codec, kernels, profile, selection
from mlx_marlin.autotune import cli as tune_cli
from mlx_marlin.autotune.labels import problem_label
from mlx_marlin.autotune.workload import Workload
from mlx_marlin.dispatch.dispatcher import get_available_kernels
from mlx_marlin.dispatch.pattern import get_expert_bits
from mlx_marlin.kernels import Hardware, KernelConfig, Problem
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile import lookup
from mlx_marlin.profile.active import AutotuneConfig, ProfileError
from mlx_marlin.selection import choices
from mlx_marlin.weights import synthetic
from tests.support.tuning import DECODE, DOCUMENT, cpu_profile, entry

HALVES = [width for width in codec.WIDTHS if codec.is_half_rate(width)]


def written(widths) -> list[str]:
    """2 and 2.0 are equal, but not written alike."""
    return [repr(width) for width in widths]


# Names


def test_names_of_all_triples_are_read_back():
    for triple in product(codec.WIDTHS, repeat=3):
        name = kernels.make_name("decode", triple, fp32acc=True)
        assert written(kernels.parse_name(name).triple) == written(triple)


def test_a_half_is_written_p5():
    assert kernels.make_name("decode", (2.5, 2, 3)) == "moe_trellis_swiglu_decode_2p5_2_3"
    assert kernels.make_name("decode", (2.0, np.float32(3.5), np.int64(3))) == "moe_trellis_swiglu_decode_2_3p5_3"


@pytest.mark.parametrize("widths", ["2p0_2_3", "4p5_2_3", "2.5_2_3", "p5_2_3", "2p5_2", "0p5_2_3", "2p5p5_2_3"])
def test_widths_that_no_name_has(widths):
    with pytest.raises(ValueError, match=r"no kernel is called .* \(2.5 bits: 2p5\)"):
        kernels.parse_name(f"moe_trellis_swiglu_decode_{widths}")


def test_available_kernels_have_eleven_widths():
    names = get_available_kernels()
    assert len(names) == 4 * (4 + len(codec.WIDTHS) ** 3) and "moe_trellis_swiglu_decode_1p5_8_3p5_fp32acc" in names


# Problems


def test_whole_widths_are_ints_and_half_rates_floats():
    problem = Problem.swiglu(256, 128, experts=4, bits=((2.5, 2.0, np.float64(3)), (2, 3.5, np.int32(4))))
    assert repr(problem.bits) == "((2, 3.5, 4), (2.5, 2, 3))" and written(problem.widths) == written(
        (2, 2.5, 3, 3.5, 4)
    )
    assert repr(Problem.linear(256, 128, bits=2.0).bits) == "((2,),)"
    assert Problem.linear(256, 128, bits=2.0) == Problem.linear(256, 128, bits=2)


@pytest.mark.parametrize("bits", [0, 0.5, 2.25, 4.5, 7.5, 9, "2", None])
def test_widths_that_the_format_has_not(bits):
    with pytest.raises(ValueError, match=r"bits must be one of 1, 1\.5, 2, 2\.5, 3, 3\.5, 4, 5, 6, 7, 8, got"):
        Problem("linear", 1, 1, 256, 128, 1, ((bits,),), ("mul1",), "none", "float32", "cpu")


@pytest.mark.parametrize("codebook", ["3inst", "mcg"])
def test_half_rates_have_one_codebook(codebook):
    with pytest.raises(ValueError, match="half rates exist for mul1 only, got 2.5 bits"):
        Problem.linear(256, 128, bits=2.5, codebooks=codebook)
    assert Problem.linear(256, 128, experts=2, bits=(2.5, 3), codebooks=(codebook, "mul1")).bits == ((2.5,), (3,))


# Configs


@pytest.mark.parametrize("device", kernels.DEVICES)
@pytest.mark.parametrize("bits", HALVES)
@pytest.mark.parametrize("rows", [1, 4, 17, 64])
def test_configs_of_half_rates(rows, bits, device):
    problem = Problem.swiglu(2048, 768, rows=rows, experts=128, top_k=8, bits=bits, device=device)
    found = kernels.candidates_on(problem, Hardware(cores=8, fast_cores=4, gpu_l1=8 << 10))
    assert found[0] == kernels.default(problem) and len(found) > 1
    assert all(kernels.feasible(problem, config) is None for config in found)


def test_a_triple_of_half_rates_runs_its_own_layers():
    name = "moe_trellis_swiglu_decode_2p5_2_3"
    config = KernelConfig(name, 1, 64, 4, True, "decode")
    fits, other = (Problem.swiglu(256, 128, bits=(triple,), device="gpu") for triple in ((2.5, 2, 3), (2.5, 2.5, 3)))
    assert kernels.feasible(fits, config) is None and kernels.config_for(fits, name).kernel_name == name
    assert "needs all experts at (2.5, 2, 3)" in kernels.feasible(other, config)


# Profiles


def test_profiles_keep_half_rates(tmp_path):
    problem = Problem.swiglu(256, 128, experts=4, top_k=2, bits=((2, 2.5, 4), (3.5, 2, 2)))
    made = cpu_profile({problem: entry(), Problem.linear(512, 128, bits=1.5): entry()})
    made.tile_size_mapping[2.5] = made.simdgroup_mapping[2.5] = 8
    text = profile_json.encode(made)
    back = profile_json.decode(text)
    assert back == made and profile_json.encode(back) == text
    assert [repr(p) for p in sorted(back.problems, key=repr)] == [repr(p) for p in sorted(made.problems, key=repr)]
    document = json.loads(text)
    assert document["lookup_table"]["1"].keys() == {"256", "512"}
    assert [*document["lookup_table"]["1"]["256"], *document["lookup_table"]["1"]["512"]] == [
        "(2, 2.5, 3.5, 4)",
        "(1.5,)",
    ]
    assert list(document["tile_size_mapping"]) == ["2", "2.5", "3", "4", "8"]


def test_older_profiles_are_read():
    back = profile_json.decode(json.dumps(DOCUMENT).encode())
    assert (
        repr(sorted(back.tile_size_mapping)) == "[2, 3, 4, 8]" and repr(list(back.lookup_table[4][4096])) == "[(2, 4)]"
    )


@pytest.mark.parametrize("key", ["(2, 2.25)", "(2.0,)", "(2.5, 2)", "(4.5,)", "(2.5)", "(2, 2.5,)"])
def test_keys_that_are_no_widths(key):
    cell = DOCUMENT["lookup_table"]["4"]["4096"]["(2, 4)"]
    text = json.dumps(DOCUMENT | {"lookup_table": {"4": {"4096": {key: cell}}}})
    with pytest.raises(ProfileError, match=r'at \$\.lookup_table\["4"\]\["4096"\]'):
        profile_json.decode(text.encode())


@pytest.mark.parametrize("bits, message", [([[2.25]], "must be one of"), ([[9.5]], "<= 8"), ([[2.5], [2]], "sorted")])
def test_widths_in_a_file_that_the_format_has_not(bits, message):
    document = json.loads(profile_json.encode(cpu_profile({Problem.linear(256, 128, bits=2.5): entry()})))
    document["problems"][0]["problem"]["bits"] = bits
    with pytest.raises(ProfileError, match=rf"{message}.* at \$\.problems\[0\]\.problem"):
        profile_json.decode(json.dumps(document).encode())


def test_a_whole_width_in_a_file_may_be_a_float():
    document = json.loads(profile_json.encode(cpu_profile({Problem.linear(256, 128, bits=2): entry()})))
    document["problems"][0]["problem"]["bits"] = [[2.0]]
    (problem,) = profile_json.decode(json.dumps(document).encode()).problems
    assert repr(problem.bits) == "((2,),)"


def test_defaults_of_half_rates_are_those_of_the_nearest_width():
    own = AutotuneConfig("M4 Max", "M4")
    for bits, nearest in ((1.5, 2), (2.5, 2), (3.5, 3)):  # of two as near the narrower
        assert lookup.default_entry(own, 4, [bits]) == lookup.default_entry(own, 4, [nearest])
    own.tile_size_mapping[2.5] = 160
    assert lookup.default_entry(own, 4, [2.5]).tile_size_n == 160


# Selection


def test_the_tuner_answers_for_half_rates():
    tuner = MixedBPWAutoTuner("M4 Max", device="cpu")
    tuner.config.lookup_table[4] = {256: {(2, 2.5, 4): DECODE}}
    assert tuner.select_kernel(4, 256, [4.0, 2.5, 2]) == DECODE
    assert tuner.select_kernel(4, 256, [2, 3, 4]) != DECODE
    for bits in ([2.25], [9], ["2"], []):
        with pytest.raises(ValueError, match="bit_widths must"):
            tuner.select_kernel(4, 256, bits)
    tuner.record_latency(DECODE.kernel_name, 4, 1.0, 256, [2.5])
    assert tuner.get_statistics()["adaptation_keys"] == 1


def test_the_selector_names_half_rates():
    selector = selection.MixedKernelSelector(exploration_rate=0.0)
    name, metadata = selector.select_kernel(1, [2.5, 3.5], gate_bits=2.5, up_bits=2.0, down_bits=3)
    assert name == "moe_trellis_swiglu_decode_2p5_2_3" and metadata["family"] == "standard"
    assert "gate 2.5, up 2, down 3 bits" in metadata["reason"]
    assert selector.select_kernel(4, [2.0, 2, 2.5])[1]["family"] == "fast_2bit"
    with pytest.raises(ValueError, match="up_bits must be one of"):
        selector.select_kernel(1, [2], gate_bits=2, up_bits=2.2, down_bits=3)


def test_bits_of_active_experts():
    metadata = {0: (2, 2.5, 3), 1: (2, 3.0, 3), 2: (4, 4, 4)}
    assert written(get_expert_bits([[1, 0]], metadata)) == ["2.5", "3"]


def test_reasons_and_labels_show_half_rates():
    problem = Problem.swiglu(256, 128, experts=4, top_k=2, bits=((2.5, 2, 3), (3.5, 3.5, 3.5)))
    assert problem_label(problem) == "swiglu 256x128 4/2 2.5_2_3,3.5"
    assert "for 1 row" in choices.choose(problem).reason and profile.find(problem) is None


def test_the_command_takes_half_rates(capsys):
    arguments = ["--shape", "256,128,4,2", "--bits"]
    assert tune_cli.parser().parse_args([*arguments, "2.5,3.5_2_3"]).bits == ((2.5, 2.5, 2.5), (3.5, 2, 3))
    for wrong in ("4.5", "2p5", "2_3", "2.0", ""):
        with pytest.raises(SystemExit):
            tune_cli.parser().parse_args([*arguments, wrong])
        assert "each one of 1, 1.5, 2" in capsys.readouterr().err


# Random weights


def test_random_weights_have_every_width_and_codebook():
    problem = Problem.linear(128, 128, experts=12, bits=(1, 2.5, 3), codebooks=codec.CODEBOOKS)
    weights = synthetic.random_projection(np.random.default_rng(0), problem, 0)
    formats = {(w.bits, w.codebook) for w in weights}
    assert formats == {(2.5, "mul1"), *product((1, 3), codec.CODEBOOKS)}


def test_the_size_of_a_workload_of_half_rates_is_known():
    problem = Problem.linear(128, 128, experts=3, rows=2, bits=(2.5, 3))
    stack = Workload.synthetic(problem).sets[0][0]
    assert stack.source.bits == (2.5, 3, 2.5) and stack.arrays[0].nbytes == 128 * 128 * 8 // 8
