"""Damaged profiles: each is read, or refused with a message that names the file."""

import json
import random

import pytest

from mlx_marlin.profile import files
from mlx_marlin.profile.active import ProfileError
from tests.support import mutations
from tests.support.tuning import DOCUMENT


def run_profile(seed, original, path):
    rng = random.Random(seed)
    data = mutations.of_json_file(rng, original)
    path.write_bytes(data)
    with mutations.refusals(seed, ProfileError, path):
        files.load(path)


@pytest.fixture(scope="module")
def original():
    return DOCUMENT.encode() if isinstance(DOCUMENT, str) else json.dumps(DOCUMENT).encode()


def test_profiles(original, tmp_path):
    for seed in range(1000):
        run_profile(seed, original, tmp_path / "profile.json")


@pytest.mark.slow
def test_many_profiles(original, tmp_path, fuzz_times):
    for seed in range(1000, 1000 + 30_000 * fuzz_times):
        run_profile(seed, original, tmp_path / "profile.json")
