"""What layers find in profiles: exact entries, their neighbours, the projection; whose profiles they use."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from msgspec import structs

from mlx_marlin import kernels, profile
from mlx_marlin.kernels import Problem
from mlx_marlin.profile import lookup, schema
from mlx_marlin.profile.active import ProfileError
from mlx_marlin.selection import choices
from tests.support.tuning import DECODE, DOCUMENT, LARGE, PREFILL, cpu_profile, entry

pytestmark = pytest.mark.usefixtures("tuning_sandbox")


def layer_problem(rows=1, **changes):
    problem = Problem.swiglu(256, 128, rows=rows, experts=4, top_k=2, bits=((2, 4, 4),))
    return replace(problem, **changes)


def write_profile(path, entries, **changes):
    made = cpu_profile({p: entry(c) for p, c in entries.items()})
    if changes:
        made.fingerprint = structs.replace(made.fingerprint, **changes)
    profile.save(made, path)
    profile.refresh()


def config_of(problem):
    found = profile.find(problem)
    return found.config if found else None


def origin(problem):
    return profile.find(problem).origin


def test_lookup_exact_then_nearest_rows_of_the_same_variant():
    write_profile(
        profile.default_path("cpu"), {layer_problem(1): DECODE, layer_problem(4): PREFILL, layer_problem(64): LARGE}
    )
    assert config_of(layer_problem(4)) == PREFILL
    assert config_of(layer_problem(2)) == PREFILL and config_of(layer_problem(16)) == PREFILL
    assert config_of(layer_problem(500)) == LARGE
    assert config_of(layer_problem(20)) is None  # no timing of the base kernel's sizes
    assert "entry for 4 rows" in profile.find(layer_problem(4)).origin


def test_lookup_falls_back_to_the_projection():
    write_profile(profile.default_path("cpu"), {layer_problem(4): PREFILL})
    assert config_of(layer_problem(4, experts=64)) == PREFILL
    assert config_of(layer_problem(4, bits=((3, 3, 3),))) is None


def test_the_projection_of_experts_is_not_for_single_products():
    experts = layer_problem(4, bits=((3, 3, 3),))
    one = Problem.linear(256, 128, rows=4, bits=3)
    wider = replace(one, intermediate=512)
    write_profile(profile.default_path("cpu"), {experts: PREFILL})
    assert config_of(one) is None and config_of(replace(experts, experts=64)) == PREFILL
    narrow = replace(PREFILL, tile_size_n=16)
    write_profile(profile.default_path("cpu"), {experts: PREFILL, one: narrow})
    assert config_of(wider) == narrow and config_of(replace(experts, experts=64)) == PREFILL
    profile.default_path("cpu").unlink()
    write_profile(profile.default_path("cpu"), {one: narrow})
    assert config_of(wider) == narrow and config_of(experts) is None


def test_a_documents_file_is_of_experts(tmp_path):
    path = tmp_path / "m4.json"
    path.write_text(json.dumps(DOCUMENT | {"lookup_table": {"4": {"256": {"(3,)": asdict(PREFILL)}}}}))
    profile.use_profile(path, allow_foreign=True)
    one = Problem.linear(256, 128, rows=4, bits=3)
    assert config_of(one) is None and config_of(layer_problem(4, bits=((3, 3, 3),))) == PREFILL


def test_more_threads_than_this_machine_has_are_all_of_its_threads():
    write_profile(profile.default_path("cpu"), {layer_problem(1): replace(DECODE, simdgroups=10_000)})
    assert config_of(layer_problem(1)) == replace(DECODE, simdgroups=kernels.cpu_threads())


def test_what_cannot_run_here_is_passed_over():
    odd = replace(PREFILL, tile_size_n=100)
    write_profile(profile.default_path("cpu"), {layer_problem(4): odd, layer_problem(8): PREFILL})
    assert config_of(layer_problem(4)) == PREFILL and "entry for 8 rows, the nearest to 4" in origin(layer_problem(4))


def test_the_same_products_in_another_dtype_or_with_scores_answer():
    """Models are tuned in one dtype without scores; layers may be called otherwise."""
    stored = layer_problem(4, combine=True, dtype="float16")
    write_profile(profile.default_path("cpu"), {stored: PREFILL})
    assert origin(stored).startswith("entry for 4 rows in the tuned profile")
    assert origin(replace(stored, combine=False)).startswith("entry for 4 rows with scores in the")
    assert origin(replace(stored, dtype="bfloat16")).startswith("entry for 4 rows of float16 in the")
    both = replace(stored, dtype="float32", combine=False, rows=6)
    assert config_of(both) == PREFILL
    assert origin(both).startswith("entry for 4 rows of float16 with scores, the nearest to 6, in the")


def test_the_entry_that_is_most_alike_answers():
    asked = layer_problem(4, dtype="float16")
    entries = {
        replace(asked, rows=8): replace(PREFILL, tile_size_n=16),
        replace(asked, combine=True): replace(PREFILL, tile_size_n=32),
        replace(asked, dtype="bfloat16"): replace(PREFILL, tile_size_n=64),
    }
    write_profile(profile.default_path("cpu"), entries)
    # The same rows before other rows; the same dtype before the same combination.
    assert config_of(asked).tile_size_n == 32
    for gone in (replace(asked, combine=True), replace(asked, dtype="bfloat16")):
        profile.default_path("cpu").unlink()
        entries.pop(gone)
        write_profile(profile.default_path("cpu"), entries)
        assert config_of(asked).tile_size_n == {2: 64, 1: 16}[len(entries)]


def test_the_reason_names_what_was_asked():
    write_profile(profile.default_path("cpu"), {layer_problem(4): PREFILL})
    reason = choices.choose(layer_problem(4)).reason
    assert reason.startswith("for 4 rows and top-k 2: entry for 4 rows in the tuned profile")
    default = choices.choose(layer_problem(1, bits=((3, 3, 3),), hidden=384, top_k=1)).reason
    assert default == "the default for 1 row and top-k 1, because no profile knows this problem"


def test_foreign_profile_is_used_only_when_allowed(tmp_path):
    path = tmp_path / "foreign.json"
    write_profile(path, {layer_problem(1): DECODE}, chip="Another chip")
    with pytest.raises(ProfileError, match="foreign profile: it was measured on Another chip"):
        profile.use_profile(path)
    assert config_of(layer_problem(1)) is None
    before = profile.generation()
    profile.use_profile(path, allow_foreign=True)
    assert config_of(layer_problem(1)) == DECODE and profile.generation() != before
    profile.use_profile(None)
    assert config_of(layer_problem(1)) is None


def test_documents_file_is_clamped_to_the_variant(tmp_path):
    path = tmp_path / "m4.json"
    path.write_text(json.dumps(DOCUMENT))
    profile.use_profile(path, allow_foreign=True)
    problem = layer_problem(4, hidden=4096)
    # The document prefers a decode kernel at 4 rows with tiles that the CPU's decode does not have.
    found = config_of(problem)
    assert found.kernel_name == "moe_trellis_mixed_swiglu_decode" and kernels.feasible(problem, found) is None


def test_a_bad_file_at_the_default_path_is_ignored_aloud(caplog):
    path = profile.default_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    profile.refresh()
    assert config_of(layer_problem(1)) is None
    assert "ignoring the tuned profile" in caplog.text and str(path) in caplog.text


def test_a_gpu_problem_without_a_gpu_has_no_profile():
    if not mx.is_available(mx.Device(mx.gpu)):
        assert config_of(layer_problem(1, device="gpu", dtype="float16")) is None


def test_kinds_of_problems_do_not_mix():
    """Behind one key each kind has its own entry, and another's is no neighbour."""
    gated = layer_problem(bits=((2, 4, 4),))
    two = Problem.mlp(256, 128, experts=4, top_k=2, bits=((2, 4),))
    one = Problem.linear(256, 128, bits=(2, 4))
    configs = {gated: replace(DECODE, tile_size_n=64), two: replace(DECODE, tile_size_n=128), one: DECODE}
    made = cpu_profile({p: entry(config) for p, config in configs.items()})
    assert len({schema.table_key(p) for p in configs}) == 1
    assert made.lookup_table[1][256][2, 4] == configs[gated]
    for p, config in configs.items():
        assert lookup.table_of(made, p.kind)[1][256][2, 4] == config, p.kind
    made = cpu_profile({p: entry(configs[p]) for p in (two, one)})
    assert made.lookup_table[1][256][2, 4] == configs[two]
    assert not lookup.table_of(made, "swiglu").get(1, {}).get(256)


def test_a_layer_of_two_matrices_finds_its_entry_and_its_neighbours(tmp_path):
    two = Problem.mlp(256, 128, experts=4, top_k=2, bits=((2, 4),))
    path = tmp_path / "profile.json"
    write_profile(path, {two: DECODE, layer_problem(): LARGE})
    profile.use_profile(path)
    assert config_of(two) == DECODE
    assert list(profile.load(path).problems) == [two, layer_problem()]
    assert config_of(replace(two, activation="gelu_tanh")) == DECODE
    assert config_of(replace(two, bits=((3, 3),))) is None
