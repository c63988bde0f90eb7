"""What the search for tiles starts from, on every backend: the machine, and sizes by bit width. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Tiles = tuple[int, int, int]
"""(tile_size_m, tile_size_n, simdgroups)."""

TILE_SIZES: dict[float, int] = {2: 128, 3: 96, 4: 64, 8: 64}
SIMDGROUPS: dict[float, int] = {2: 16, 3: 12, 4: 8, 8: 4}
"""Columns and simdgroups by bit width: fewer bits unpack into more weights per byte, so that more columns and more
simdgroups work on as many bytes. Other widths take those of the nearest. The defaults of a profile, and always among a
GPU's candidates."""


@dataclass(frozen=True)
class Hardware:
    """What a device has, as far as tiles depend on it. The defaults are what is assumed where nothing tells.

    Attributes:
        cores: Cores of the CPU that this process may use, or of the GPU; 0 where not known.
        fast_cores: Of a CPU's cores those of the fastest kind.
        l1d: Bytes of a CPU core's first-level data cache. Default: 32 KB, the least among current ones.
        l2_per_core: Bytes of second-level cache per core. Default: 256 KB, the least among current ones.
        threadgroup_bytes: Memory of a threadgroup. Default: 32 KB, Metal's limit on every Apple GPU.
        gpu_l1: Bytes of a GPU core's first-level cache; 0 where not known, which limits nothing.
    """

    cores: int = 0
    fast_cores: int = 0
    l1d: int = 32 << 10
    l2_per_core: int = 256 << 10
    threadgroup_bytes: int = 32 << 10
    gpu_l1: int = 0


def nearest_width(mapping: Mapping[float, int], bits: float) -> int:
    """What a mapping by bit width says about a width: the value of the nearest one, the smaller of two as near."""
    return mapping[min(mapping, key=lambda width: (abs(width - bits), width))]
