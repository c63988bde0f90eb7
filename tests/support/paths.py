"""Where things lie in a clone."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
MODELS = ROOT / "models"
TESTS = ROOT / "tests"
VECTORS = TESTS / "vectors"
