"""Tables of other machines and builds: they answer the tuner's look-ups, and are never written over."""

import json

import pytest
from msgspec import structs

from mlx_marlin import device
from mlx_marlin.autotune.tuner import AutotuneConfig, MixedBPWAutoTuner
from mlx_marlin.measure.race import RaceSettings
from mlx_marlin.profile import files as profile_files
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.active import ProfileError
from tests.support.tuning import DECODE, DOCUMENT, PREFILL, cpu_profile, linear

FAST = RaceSettings(rounds=2, warmup=1)


pytestmark = pytest.mark.usefixtures("tuning_sandbox")


def foreign(tmp_path, kind):
    """A file that holds nothing of this machine."""
    path = tmp_path / "foreign.json"
    if kind == "no fingerprint":
        path.write_text(json.dumps(DOCUMENT))
    else:
        other = cpu_profile()
        other.lookup_table = {4: {4096: {(2, 4): PREFILL}}}
        change = {"chip": "Another chip"} if kind == "another chip" else {"kernel_hash": "0" * 16}
        other.fingerprint = structs.replace(other.fingerprint, **change)
        path.write_bytes(profile_json.encode(other))
    return path


@pytest.mark.parametrize("kind", ["no fingerprint", "another chip", "another build"])
@pytest.mark.parametrize("load", [MixedBPWAutoTuner.load_config, lambda path: MixedBPWAutoTuner(config_path=path)])
def test_results_go_into_a_profile_of_this_machine(tmp_path, kind, load):
    path = foreign(tmp_path, kind)
    before = path.read_bytes()
    tuner = load(path)
    told = tuner.select_kernel(4, 4096, [2, 4])
    tuner.race = FAST
    tuner.benchmark_layer(linear(), 4, num_warmup=1, num_iter=2)
    assert tuner.config.fingerprint == device.fingerprint("cpu") and tuner.config.source == "measured"
    assert tuner.config.device_name == device.device_name("cpu")
    assert tuner.config.lookup_table.keys() == {4} and tuner.config.lookup_table[4].keys() == {256}
    assert tuner.select_kernel(4, 4096, [2, 4]) == told  # the foreign table still answers
    for export in (tuner.export_config, lambda: tuner.export_config(path)):
        with pytest.raises(ProfileError, match="foreign.json is not overwritten: .* Choose another output file"):
            export()
    assert path.read_bytes() == before
    tuner.export_config(tmp_path / "mine.json")
    assert MixedBPWAutoTuner.load_config(tmp_path / "mine.json").config == tuner.config


@pytest.mark.parametrize("kind", ["no fingerprint", "another chip", "another build"])
def test_a_foreign_table_is_not_written_over_its_file(tmp_path, kind):
    path = foreign(tmp_path, kind)
    before = path.read_bytes()
    tuner = MixedBPWAutoTuner.load_config(path)
    tuner.config.lookup_table[1] = {256: {(3,): DECODE}}
    with pytest.raises(ProfileError, match="the tuner holds a foreign profile: it "):
        tuner.export_config()
    assert path.read_bytes() == before
    tuner.export_config(tmp_path / "copy.json")
    assert profile_files.load(tmp_path / "copy.json") == tuner.config


def test_a_tuner_for_another_device_measures_for_this_one(tmp_path):
    tuner = MixedBPWAutoTuner("M4 Max", device="cpu", race=FAST)
    assert tuner.config == AutotuneConfig("M4 Max", "M4")
    tuner.benchmark_layer(linear(), 1, num_warmup=1, num_iter=2)
    text = json.loads(tuner.export_config(tmp_path / "p.json"))
    assert (text["device_name"], text["fingerprint"]["chip"]) == (
        device.device_name("cpu"),
        device.fingerprint("cpu").chip,
    )
