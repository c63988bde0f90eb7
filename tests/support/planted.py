"""Wrong decoders, close to the right one, that the tests must reject."""

import numpy as np

from mlx_marlin import codec

_decode, _unpack = codec.decode, codec.unpack


def _mul1_byte_sum(states: np.ndarray) -> np.ndarray:
    x = states.astype(np.uint32) * np.uint32(0x83DCD12D)
    return sum(x >> np.uint32(shift) & np.uint32(0xFF) for shift in (0, 8, 16, 24))


def _mul1_offset_510(states, codebook):
    """The CPU path of ExLlamaV3: (s - 510) * scale, 0.0018 above the format's values."""
    if codebook != "mul1":
        return _decode(states, codebook)
    return ((_mul1_byte_sum(states) - 510.0) * 0.00676727294921875).astype(np.float16)


def _mul1_affine(states, codebook):
    """The right offset, but not rounded to half precision."""
    if codebook != "mul1":
        return _decode(states, codebook)
    return (1024 + _mul1_byte_sum(states)) * codec._MUL1_SCALE + codec._MUL1_OFFSET


def _3inst_without_increment(states, codebook):
    """The constant of 3INST left out."""
    if codebook != "3inst":
        return _decode(states, codebook)
    x = np.asarray(states).astype(np.uint32) * np.uint32(89226354)
    x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    return (x & 0xFFFF).astype(np.uint16).view(np.float16) + (x >> 16).astype(np.uint16).view(np.float16)


def _swapped_halves(trellis):
    """The stream read in uint16 order instead of uint32 order."""
    return _unpack(codec._swap_halves(np.asarray(trellis)))


# Name: (function of codec that it replaces, replacement, codebooks that it is wrong for).
PLANTED = {
    "mul1_offset_510": ("decode", _mul1_offset_510, ("mul1",)),
    "3inst_without_increment": ("decode", _3inst_without_increment, ("3inst",)),
    "swapped_halves": ("unpack", _swapped_halves, codec.CODEBOOKS),
}

# Too close for half precision activations; float32 and the comparison of decoded values reject it.
PLANTED_FLOAT32 = {"mul1_affine": ("decode", _mul1_affine, ("mul1",))}
