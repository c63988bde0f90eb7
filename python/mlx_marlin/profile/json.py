"""Profiles as JSON text, every field checked."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .. import kernels
from ..device.fingerprint import Fingerprint
from ..kernels import KernelConfig, Problem
from .schema import MAX_REASON, AutotuneConfig, Entry, Measured, ProfileError, Rejected, Timing

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Rows = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Tile = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Bits = Annotated[int, msgspec.Meta(ge=1, le=kernels.MAX_KERNEL_BITS)]
_Positive = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
_Ratio = Annotated[float, msgspec.Meta(gt=0.0, le=1e15)]
_Family = Literal["M1", "M2", "M3", "M4", "M5", "CPU", "Unknown"]


class _Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A part of the file; unknown fields are errors."""


class _Config(_Record):
    kernel_name: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_]{1,128}\Z")]
    tile_size_m: _Tile
    tile_size_n: _Tile
    simdgroups: _Tile
    use_fp32_acc: bool = False
    kernel_variant: Literal["decode", "prefill4", "prefill", "base", "large_batch"] = "base"

    def value(self) -> KernelConfig:
        # "prefill", in files without a fingerprint, is the kernel for 2 to 16 rows.
        variant = "prefill4" if self.kernel_variant == "prefill" else self.kernel_variant
        return KernelConfig(
            self.kernel_name, self.tile_size_m, self.tile_size_n, self.simdgroups, self.use_fp32_acc, variant
        )


class _Problem(_Record):
    kind: Literal["linear", "swiglu"]
    rows: _Rows
    top_k: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    hidden: _Size
    intermediate: _Size
    experts: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    bits: Annotated[tuple[tuple[_Bits, ...], ...], msgspec.Meta(min_length=1, max_length=8**3)]
    codebooks: Annotated[tuple[Literal["3inst", "mcg", "mul1"], ...], msgspec.Meta(min_length=1)]
    activation: Literal["none", "silu", "gelu_tanh", "swiglu_oai"]
    dtype: Literal["float32", "float16", "bfloat16"]
    device: Literal["cpu", "gpu"]
    combine: bool = False
    bias: bool = False

    def __post_init__(self):
        wanted = 1 if self.kind == "linear" else 3
        if any(len(group) != wanted for group in self.bits):
            raise ValueError(f"each element of bits must have {wanted} widths for kind {self.kind!r}")
        for name in ("bits", "codebooks"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be sorted and distinct")
        if (self.activation == "none") != (self.kind == "linear"):
            raise ValueError(f"kind {self.kind!r} does not go with activation {self.activation!r}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")

    def value(self) -> Problem:
        return Problem(**{name: getattr(self, name) for name in self.__struct_fields__})


class _Timing(_Record):
    n: _Count
    median_ms: _Positive
    spread: _Positive

    def value(self) -> Timing:
        return Timing(self.n, self.median_ms, self.spread)


class _Measured(_Record):
    config: _Config
    timing: _Timing
    error: Annotated[float, msgspec.Meta(ge=-1.0, le=1e30)] = -1.0
    memory_mb: _Positive = 0.0

    def value(self) -> Measured:
        return Measured(self.config.value(), self.timing.value(), self.error, self.memory_mb)


class _Rejected(_Record):
    config: _Config
    reason: _Reason

    def value(self) -> Rejected:
        return Rejected(self.config.value(), self.reason)


class _Entry(_Record):
    problem: _Problem
    config: _Config
    samples: _Timing
    default: _Config
    baseline: _Timing
    ratio: tuple[_Ratio, _Ratio, _Ratio]
    decision: Literal["faster", "default", "undecided"]
    verdict: Literal["correct", "unchecked"]
    timestamp: _Positive
    timings: tuple[_Measured, ...] = ()
    rejected: tuple[_Rejected, ...] = ()
    objective: tuple[_Positive, _Positive, _Positive] = (1.0, 0.0, 0.0)
    over_control: tuple[_Ratio, _Ratio, _Ratio] | None = None

    def __post_init__(self):
        for name in ("config", "default"):
            # Layers run these: a name that no kernel has is an error here, not a silent default later.
            kernels.parse_name(getattr(self, name).kernel_name)

    def value(self) -> Entry:
        return Entry(
            self.config.value(),
            self.samples.value(),
            self.default.value(),
            self.baseline.value(),
            self.ratio,
            self.decision,
            self.verdict,
            # From a clock that was ahead: it must not look newer than what is measured from now on.
            self.timestamp if self.timestamp <= time.time() else 0.0,
            tuple(t.value() for t in self.timings),
            tuple(r.value() for r in self.rejected),
            self.objective,
            self.over_control,
        )


class _Fingerprint(_Record):
    device: Literal["cpu", "gpu"]
    chip: _Text
    cores: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    instruction_set: Annotated[str, msgspec.Meta(max_length=64)]
    os: _Text
    mlx_version: _Text
    kernel_hash: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{0,64}\Z")]


class _Profile(_Record):
    device_name: _Text
    device_family: _Family
    tile_size_mapping: dict[str, Any]
    simdgroup_mapping: dict[str, Any]
    lookup_table: dict[str, Any]
    adaptation_enabled: bool = True
    adaptation_history_len: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 100
    benchmark_count: _Count = 0
    fingerprint: _Fingerprint | None = None
    source: Literal["measured", "predicted"] = "measured"
    problems: tuple[_Entry, ...] = ()


def storable(config: KernelConfig) -> bool:
    """Whether a profile can hold a config: a user may have made up any."""
    try:
        return msgspec.convert(asdict(config), _Config).value() == config
    except (msgspec.ValidationError, TypeError):
        return False


def _fail(where: Path | str, path: str, problem: str):
    raise ProfileError(f"{where}: {problem} at {path}. Correct the field, or delete the file and tune again")


def _convert(where, value, kind, path: str):
    """msgspec.convert with the full path of the bad field in the error."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, tail = str(error).partition(" - at `$")
        _fail(where, path + tail.rstrip("`"), message)


def _items(where, value, path: str, pattern: str, wanted: str):
    """Items of an object whose keys must have a form; each with the path of its value."""
    for key, item in _convert(where, value, dict[str, Any], path).items():
        if not re.fullmatch(pattern, key):
            _fail(where, path, f"key {key[:64]!r} is not {wanted}")
        yield key, item, f'{path}["{key}"]'


def _mapping(where, value, path: str) -> dict[int, int]:
    items = _items(where, value, path, "[1-8]", "a bit width from 1 to 8")
    return {int(key): _convert(where, item, _Tile, at) for key, item, at in items}


def _widths(where, key: str, path: str) -> tuple[int, ...]:
    widths = tuple(int(digit) for digit in re.findall("[1-8]", key))
    if list(widths) != sorted(set(widths)):
        _fail(where, path, f"key {key!r} must list its bit widths sorted and distinct")
    return widths


def _table(where, value) -> dict:
    table: dict = {}
    # 10 digits hold every number of rows that the kernels take; longer keys are refused before int() sees them.
    for batch, row, at_row in _items(where, value, "$.lookup_table", "[1-9][0-9]{0,9}", "a number of tokens"):
        for hidden, cell, at_cell in _items(where, row, at_row, "[1-9][0-9]{0,7}", "a hidden size"):
            widths = _items(
                where, cell, at_cell, r"\(([1-8](, [1-8])+|[1-8],)\)", 'bit widths such as "(2, 4)" or "(2,)"'
            )
            for key, config, at in widths:
                columns = table.setdefault(int(batch), {}).setdefault(int(hidden), {})
                columns[_widths(where, key, at)] = _convert(where, config, _Config, at).value()
    return table


def decode(data: bytes, where: Path | str = "profile") -> AutotuneConfig:
    """A profile from its JSON text, every field checked.

    Args:
        data: The text.
        where: What to call it in errors.

    Raises:
        ProfileError: If it is not JSON, or a field is missing, unknown or out of range; with the field's path.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        _fail(where, "$", f"not JSON: {error}")
    wire = _convert(where, raw, _Profile, "$")
    problems: dict[Problem, Entry] = {}
    for i, record in enumerate(wire.problems):
        problem = record.problem.value()
        if problem in problems:
            _fail(where, f"$.problems[{i}].problem", "a second entry for the same problem")
        problems[problem] = record.value()
    return AutotuneConfig(
        wire.device_name,
        wire.device_family,
        _mapping(where, wire.tile_size_mapping, "$.tile_size_mapping"),
        _mapping(where, wire.simdgroup_mapping, "$.simdgroup_mapping"),
        _table(where, wire.lookup_table),
        wire.adaptation_enabled,
        wire.adaptation_history_len,
        wire.benchmark_count,
        Fingerprint(**msgspec.structs.asdict(wire.fingerprint)) if wire.fingerprint else None,
        wire.source,
        problems,
    )


def encode(profile: AutotuneConfig) -> bytes:
    """The JSON text of a profile: sorted, indented, and decoding to an equal profile."""
    table = {
        str(batch): {
            str(hidden): {str(widths): asdict(config) for widths, config in sorted(cell.items())}
            for hidden, cell in sorted(row.items())
        }
        for batch, row in sorted(profile.lookup_table.items())
    }
    out = {
        "device_name": profile.device_name,
        "device_family": profile.device_family,
        "tile_size_mapping": {str(k): v for k, v in sorted(profile.tile_size_mapping.items())},
        "simdgroup_mapping": {str(k): v for k, v in sorted(profile.simdgroup_mapping.items())},
        "lookup_table": table,
        "adaptation_enabled": profile.adaptation_enabled,
        "adaptation_history_len": profile.adaptation_history_len,
        "benchmark_count": profile.benchmark_count,
    }
    if profile.fingerprint is not None:
        out["fingerprint"] = asdict(profile.fingerprint)
    if profile.fingerprint is not None or profile.problems or profile.source != "measured":
        out["source"] = profile.source
        ordered = sorted(profile.problems.items(), key=lambda item: repr(item[0]))
        out["problems"] = [{"problem": asdict(problem), **asdict(entry)} for problem, entry in ordered]
    return msgspec.json.format(msgspec.json.encode(out), indent=2) + b"\n"
