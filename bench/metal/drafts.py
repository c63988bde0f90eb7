"""Predicted: how many tokens of a draft must be right for its verification to pay, by chip and rows.

A layer of Qwen3-30B-A3B, its experts and its linears, at 3 bits. Rows choose experts at random, as in layer.py: 8 rows
take 52 experts. Each call has the default of its chip. What a step costs beside that (attention, the drafter, mlx-vlm
itself) is left out.

    python -m bench.metal.drafts
"""

from __future__ import annotations

from bench.metal.chips import CHIPS, Chip
from bench.metal.predict import default_on, predicted_us, qwen3_30b
from mlx_marlin.kernels.problem import Problem

ROWS = (1, 2, 4, 8)
BITS = 3
# Queries, keys, values, the output.
LINEARS = ((2048, 4096), (2048, 512), (2048, 512), (4096, 2048))


def _us(problem: Problem, chip: Chip) -> float:
    return predicted_us(problem, default_on(problem, chip), chip)


def layer(chip: Chip, rows: int) -> tuple[float, float]:
    """Microseconds of the experts, and of the linears."""
    linears = sum(
        _us(Problem.linear(k, n, rows=rows, bits=BITS, codebooks="mcg", device="gpu"), chip) for k, n in LINEARS
    )
    return _us(qwen3_30b(BITS, rows), chip), linears


def main() -> None:
    """Print the table of NOTES.md."""
    print(f"| chip | experts and linears, 1 row, us | {' | '.join(f'{rows} rows' for rows in ROWS[1:])} |")
    print("|---|---|" + "---|" * len(ROWS[1:]))
    for name, chip in CHIPS.items():
        (experts, linears), *more = (layer(chip, rows) for rows in ROWS)
        alone = experts + linears
        print(f"| {name} | {experts:.0f} + {linears:.0f} | {' | '.join(f'{sum(us) / alone:.1f}' for us in more)} |")


if __name__ == "__main__":
    main()
