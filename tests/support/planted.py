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
    return (1024 + _mul1_byte_sum(states)) * codec.trellis._MUL1_SCALE + codec.trellis._MUL1_OFFSET


def _3inst_without_increment(states, codebook):
    """The constant of 3INST left out."""
    if codebook != "3inst":
        return _decode(states, codebook)
    x = np.asarray(states).astype(np.uint32) * np.uint32(89226354)
    x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    return (x & 0xFFFF).astype(np.uint16).view(np.float16) + (x >> 16).astype(np.uint16).view(np.float16)


def _swapped_halves(trellis):
    """The stream read in uint16 order instead of uint32 order."""
    return _unpack(codec.trellis._swap_halves(np.asarray(trellis)))


# Name: (function of codec that it replaces, replacement, codebooks that it is wrong for).
PLANTED = {
    "mul1_offset_510": ("decode", _mul1_offset_510, ("mul1",)),
    "3inst_without_increment": ("decode", _3inst_without_increment, ("3inst",)),
    "swapped_halves": ("unpack", _swapped_halves, codec.CODEBOOKS),
}


def _odd_positions_first(trellis):
    """A half rate's extra bits at even positions instead of odd ones."""
    trellis = np.asarray(trellis).view(np.uint16)
    halves = codec.half_bits(codec.trellis_bits(trellis.shape))
    if halves % 2 == 0:
        return _unpack(trellis)
    stream = np.unpackbits(
        codec.trellis._swap_halves(np.ascontiguousarray(trellis)).astype(">u2").view(np.uint8), axis=-1
    )
    end = ((np.arange(codec.TILE_SIZE) + 1) * halves + 1) // 2
    window = (end[:, None] - 16 + np.arange(16)) % stream.shape[-1]
    return np.packbits(np.take(stream, window, axis=-1), axis=-1).view(">u2")[..., 0].astype(np.uint16)


def _floored_rate(trellis):
    """What readers older than half rates do: the whole width below."""
    bits = codec.trellis_bits(np.shape(trellis))
    return _unpack(np.ascontiguousarray(np.asarray(trellis)[..., : codec.words_per_tile(int(bits))]))


# Wrong for half rates only, otherwise the same.
PLANTED_HALF_RATES = {
    "odd_positions_first": ("unpack", _odd_positions_first, ("mul1",)),
    "floored_rate": ("unpack", _floored_rate, ("mul1",)),
}

# Too close for half precision activations; float32 and the comparison of decoded values reject it.
PLANTED_FLOAT32 = {"mul1_affine": ("decode", _mul1_affine, ("mul1",))}
