"""What a checkpoint is, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .info import Info, Memory


def _amount(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def _table(title: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Rows of names, columns of widths; empty without rows."""
    if not counts:
        return []
    widths = sorted({bits for row in counts.values() for bits in row}, key=float)
    size = max(len(title), *map(len, counts))
    lines = ["", f"{title:{size}}  " + "".join(f"{bits:>7}" for bits in widths)]
    for name, row in counts.items():
        lines.append(f"{name:{size}}  " + "".join(f"{row.get(bits, '-'):>7}" for bits in widths))
    return lines


def _memory(memory: Memory) -> Iterable[str]:
    where = f"on the {memory.device} with {memory.context} tokens"
    if memory.cache is None:
        yield f"memory {where}: weights {_amount(memory.weights)}, and a cache of unknown size"
        yield f"  ({memory.cache_unknown})"
        verdict = "the weights fit" if memory.fits else "the weights do not fit"
    else:
        total = memory.weights + memory.cache
        yield (f"memory {where}: weights {_amount(memory.weights)} + cache {_amount(memory.cache)} = {_amount(total)}")
        verdict = "it fits" if memory.fits else "it does not fit"
    yield f"  {verdict} into the {_amount(memory.available)} that this machine has for it"


def report(info: Info) -> str:
    """An :class:`Info` as lines."""
    written = f", written by {info.version}" if info.version else ""
    quantized = "unquantized" if info.embedding_bits is None else f"{info.embedding_bits} bits"
    head = "not quantized or tied" if info.head_bits is None else f"{info.head_bits:g} bits"
    lines = [
        f"{info.directory}: {info.format}{written}",
        f"{info.architecture} ({info.model_type}), {info.weights / 1e6:.1f} million weights",
        f"bits per weight: {info.bits_per_weight:.2f} overall, {info.linear_bits_per_weight:.2f} in the quantized "
        f"linears with their scales; head {head}, token embedding {quantized}",
        "",
    ]
    lines += [f"{kind:12} {_amount(size):>10}" for kind, size in info.bytes.items()]
    total = max(1, sum(info.widths.values()))
    shares = ", ".join(f"{bits}: {100 * count / total:.1f} %" for bits, count in info.widths.items())
    lines += ["", f"weights by bits: {shares}" if shares else "no quantized linears beside the head"]
    lines += _table("linears by bits", info.projections)
    lines += _table("experts by bits", info.experts)
    lines += ["", "codebooks: " + ", ".join(f"{name} ({count} linears)" for name, count in info.codebooks.items())]
    parts = ", ".join(f"{part} ({_amount(size)})" for part, size in info.left_out.items())
    lines += [f"left out: {parts or 'nothing'}"]
    if info.memory is None:
        lines += ["", f"mlx-lm cannot load it: {info.not_loadable}"]
        return "\n".join(lines)
    lines += ["", *_memory(info.memory), "", f"next: mlx_marlin chat --model {info.directory}"]
    lines += [f"      mlx_marlin-tune --model {info.directory}"]
    return "\n".join(lines)
