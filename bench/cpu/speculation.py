"""Tokens per step and tokens/s of mlx-vlm's speculation over quantized layers, on a small model with a planted drafter.

The drafter says what the model says (tests/support/drafting.py): the most that speculation can give on this machine.

    python -m bench.cpu.speculation
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx_vlm

from mlx_marlin import vlm
from tests.support import drafting
from tests.support.vlm_checkpoints import PROCESSED, write_processor

# Large enough for weights, not calls, to take the time.
SIZES = replace(PROCESSED, hidden=768, heads=8, experts=32, width=512, dense_width=1024)
TOKENS, TIMES = 64, 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = write_processor(drafting.agreeing(SIZES).write(Path(folder)))
        (model, processor), drafter = vlm.load(directory), vlm.load_drafter(directory)
    prompt = mlx_vlm.apply_chat_template(processor, model.config, "What is this?")
    options = {"max_tokens": TOKENS, "temperature": 0.0}
    kinds: dict[int, dict] = {1: {}}
    for rows in (2, 4, 8):
        kinds[rows] = {"draft_model": drafter, "draft_kind": "mtp", "draft_block_size": rows}
    speeds: dict[int, list[float]] = {rows: [] for rows in kinds}
    steps = {1: 1.0}
    texts = set()
    for _ in range(TIMES):  # in turn, so that all meet the same disturbances
        for rows, speculation in kinds.items():
            result = mlx_vlm.generate(model, processor, prompt, **options, **speculation)
            speeds[rows].append(result.generation_tps)
            texts.add(result.text)
            if speculation:
                steps[rows] = (sum(drafter.accept_lens) + len(drafter.accept_lens)) / len(drafter.accept_lens)
    print(f"{len(texts)} text(s)\n\nrows verified at once  tokens per step  tokens/s (median of {TIMES})")
    for rows, speed in speeds.items():
        print(f"{rows:<22} {steps[rows]:<16.2f} {statistics.median(speed):.0f}")


if __name__ == "__main__":
    main()
