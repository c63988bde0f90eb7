"""Weights of the older "metal-marlin" format: a scalar grid with group scales and sign vectors.

``W[i, o] = (index[i, o] - (2**b - 1) / 2) * 1.24371088 * scales[group(i), o] * su[i] * sv[o]``. The grid is affine, so
the product runs on MLX's own quantized matmul. Source: metal-marlin, ``quantization/trellis_codebook.py`` and
``trellis/packing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GRID_SCALE = 1.24371088
_TILE = 16
# Widths that the format's own kernels multiply with. It can pack 5, 6 and 7 too, and nothing ever ran them.
KERNEL_BITS = (2, 3, 4, 8)
MLX_GROUPS = (32, 64, 128)


class GridWeight:
    """One weight of a metal-marlin directory, validated.

    Args:
        indices: uint8, flat: one byte with b, then the b-bit indices of all tiles as one bit string, least
            significant bit first; tiles ``[out / 16, in / 16]``, inside a tile output-major.
        scales: float32 ``[groups, out_features]``; a group is ``ceil(in_features / groups)`` inputs.
        su: float32 ``[in_features]``.
        sv: float32 ``[out_features]``.
        shape: ``(out_features, in_features)``, as the format's index lists it.

    Raises:
        ValueError: If a shape, a dtype or the header byte does not fit, or b is none of 2, 3, 4 and 8.

    Attributes:
        bits: b.
        in_features, out_features: Sizes.
        codes: uint8 ``[out_features, in_features]``, the indices.
    """

    def __init__(self, indices: np.ndarray, scales: np.ndarray, su: np.ndarray, sv: np.ndarray, shape: Sequence[int]):
        indices = np.asarray(indices)
        if indices.dtype != np.uint8 or indices.ndim != 1 or not indices.size:
            raise ValueError(f"indices must be flat uint8, got {indices.dtype} {list(indices.shape)}")
        self.bits = int(indices[0])
        if self.bits not in KERNEL_BITS:
            raise ValueError(
                f"the indices' header byte gives {self.bits} bits; the format's kernels multiply with "
                f"{', '.join(map(str, KERNEL_BITS))} bits only"
            )
        self.out_features, self.in_features = (int(n) for n in shape)
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"shape must be (out_features, in_features), both positive, got {tuple(shape)}")
        self.scales, self.su, self.sv = (np.asarray(a) for a in (scales, su, sv))
        wanted = {"su": (self.in_features,), "sv": (self.out_features,)}
        wanted["scales"] = (*self.scales.shape[:1], self.out_features)
        for name, size in wanted.items():
            value = getattr(self, name)
            if value.dtype != np.float32 or value.shape != size:
                raise ValueError(f"{name} must be float32 {list(size)}, got {value.dtype} {list(value.shape)}")
        groups = len(self.scales)
        if not 1 <= groups <= self.in_features:
            raise ValueError(f"scales must have 1 to {self.in_features} groups, got {groups}")
        self.group_size = -(-self.in_features // groups)
        if -(-self.in_features // self.group_size) != groups:
            raise ValueError(f"{groups} groups do not divide {self.in_features} inputs into equal parts")
        self.codes = self._unpack(indices[1:])

    def _unpack(self, data: np.ndarray) -> np.ndarray:
        rows, columns = (-(-n // _TILE) for n in (self.out_features, self.in_features))
        count = rows * columns * _TILE * _TILE
        if data.size != count * self.bits // 8:
            raise ValueError(
                f"indices must hold 1 + {count * self.bits // 8} bytes for {self.bits} bits and shape "
                f"({self.out_features}, {self.in_features}), got {data.size + 1}"
            )
        fields = np.unpackbits(data, bitorder="little").reshape(count, self.bits)
        codes = np.packbits(fields, axis=1, bitorder="little").reshape(rows, columns, _TILE, _TILE)
        matrix = codes.transpose(0, 2, 1, 3).reshape(rows * _TILE, columns * _TILE)
        return np.ascontiguousarray(matrix[: self.out_features, : self.in_features])

    def dequantize(self) -> np.ndarray:
        """The effective weight, float64 ``[in_features, out_features]``."""
        groups = np.arange(self.in_features) // self.group_size
        values = (self.codes.T.astype(np.float64) - (2**self.bits - 1) / 2) * GRID_SCALE
        return values * self.scales.astype(np.float64)[groups] * self.su[:, None] * self.sv[None, :]

    def __repr__(self) -> str:
        return (
            f"GridWeight(in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size})"
        )
