"""The benchmarked layer: the MoE block of Qwen3-30B-A3B without its router."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Sizes of a MoE layer."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.intermediate

    def routings(self, rng: np.random.Generator, rows: int, count: int) -> list[np.ndarray]:
        """uint32 [rows, top_k] each: distinct experts per row, uniformly drawn."""
        return [
            rng.random((rows, self.experts)).argpartition(self.top_k, axis=1)[:, : self.top_k].astype(np.uint32)
            for _ in range(count)
        ]

    def inputs(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """float32 [rows, hidden]."""
        return rng.standard_normal((rows, self.hidden), np.float32)
