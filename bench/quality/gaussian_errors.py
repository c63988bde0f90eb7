"""The error that the search leaves of Gaussian tiles wider and narrower than the codebook is scaled for, at every K.

Usage: python -m bench.quality.gaussian_errors [--tiles 64]

Writes the table by which the converter expects losses and chooses scales (``quantize/gaussian_errors.json``). It holds
for the codebooks themselves and needs writing again only if a codebook or a width is added. The mean error of 64 tiles
is known to 1 %; they take a minute of processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

import numpy as np

from mlx_marlin import codec, ops
from mlx_marlin.quantize.regularise import GAUSSIAN_ERRORS
from mlx_marlin.quantize.settings import all_widths
from mlx_marlin.storage import atomic

# 1 is near every codebook's best scale, at 1/4 and at 4 the error is several times the least. Between neighbours, a
# factor of 1.3, its logarithm bends little.
DEVIATIONS = np.exp2(np.linspace(-2, 2.5, 13))


def log_errors(codebook: str, bits: float, tiles: int) -> list[float]:
    """Logarithm of the mean squared error at each of :data:`DEVIATIONS`; the tiles are the same but for that."""
    unit = np.random.default_rng(0).standard_normal((tiles, codec.TILE_SIZE))
    targets = (DEVIATIONS[:, None, None] * unit).astype(np.float32)
    found = codec.decode(ops.viterbi_search(targets.reshape(-1, codec.TILE_SIZE), bits, codebook), codebook)
    errors = np.square(found.reshape(targets.shape).astype(np.float64) - targets)
    return [math.log(e) for e in errors.mean(axis=(1, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=64)
    tiles = parser.parse_args().tiles
    rows = []
    for codebook in codec.CODEBOOKS:
        for bits in all_widths(codebook):
            print(f"{codebook} at {bits} bits", file=sys.stderr)
            found = [round(e, 5) for e in log_errors(codebook, bits, tiles)]
            rows.append(json.dumps({"codebook": codebook, "bits": bits, "log_errors": found}))
    head = f'"tiles": {tiles},\n"deviations": {json.dumps([round(d, 6) for d in DEVIATIONS.tolist()])}'
    table = ",\n".join(rows)
    atomic.write_text(GAUSSIAN_ERRORS, f'{{\n{head},\n"curves": [\n{table}\n]\n}}\n')


if __name__ == "__main__":
    main()
