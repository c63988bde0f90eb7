"""The encoder's search on a Mac: whether it is right, and how fast."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from mlx_marlin import codec, ops

PREDICTED = Path(__file__).resolve().parents[1] / "results" / "metal_search.json"
_ROUNDS = 3
_TILES_PER_CORE = 16  # what conversions have at work


def faults() -> dict[str, str]:
    """What is wrong with the search, by width and codebook; nothing for those that are right."""
    found = {f"trellis_viterbi of {c} at {b} bits": ops.search_fault(b, c) for b, c in codec.FORMATS}
    return {name: fault for name, fault in found.items() if fault}


def times(cores: int, chip: str) -> list[dict]:
    """Weights per second, the best of some rounds, beside what is predicted for the chip, if anything is."""
    rows = []
    predicted = {(row["chip"], row["bits"]): row["weights/s"] for row in json.loads(PREDICTED.read_text())}
    for bits in dict.fromkeys(bits for _, bits in predicted):
        tiles = np.random.default_rng(0).standard_normal((_TILES_PER_CORE * cores, codec.TILE_SIZE))
        ops.viterbi_search(tiles[:1], bits, "mul1")
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            ops.viterbi_search(tiles, bits, "mul1")
            seconds.append(time.perf_counter() - start)
        row = {"bits": bits, "codebook": "mul1", "tiles": len(tiles), "weights/s": round(tiles.size / min(seconds))}
        if (chip, bits) in predicted:
            row["predicted weights/s"] = predicted[chip, bits]
        rows.append(row)
    return rows
