"""Profiles as JSON text, every field checked."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import structs

from .. import codec, kernels
from ..device.fingerprint import Fingerprint
from ..kernels import KernelConfig, Problem
from .schema import AutotuneConfig, Entry, LookupTable, ProfileError

Where = Path | str
"""What a profile is called in errors."""

# The longer first: of "2.5" a search would find the 2.
_WIDTH = (
    f"(?:{'|'.join(re.escape(str(width)) for width in sorted(codec.WIDTHS, key=codec.is_half_rate, reverse=True))})"
)
_WIDTHS = rf"\((({_WIDTH})(, ({_WIDTH}))+|({_WIDTH}),)\)"
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class _StoredEntry(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry with its problem, as the file lists them."""

    problem: Problem

    def entry(self) -> Entry:
        found = Entry(*(getattr(self, name) for name in Entry.__struct_fields__))
        # From a clock that was ahead: it must not look newer than what is measured from now on.
        return found if found.timestamp <= time.time() else structs.replace(found, timestamp=0.0)


class _Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file. Tables have keys that JSON cannot have and are read apart."""

    device_name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    device_family: Literal["M1", "M2", "M3", "M4", "M5", "CPU", "Unknown"]
    tile_size_mapping: dict[str, Any]
    simdgroup_mapping: dict[str, Any]
    lookup_table: dict[str, Any]
    adaptation_enabled: bool = True
    adaptation_history_len: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 100
    benchmark_count: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    fingerprint: Fingerprint | None = None
    source: Literal["measured", "predicted"] = "measured"
    problems: tuple[_StoredEntry, ...] = ()


def storable(config: KernelConfig) -> bool:
    """Whether a profile can hold a config: a user may have made up any."""
    try:
        return msgspec.convert(asdict(config), KernelConfig) == config
    except (msgspec.ValidationError, TypeError):
        return False


def _fail(where: Where, path: str, problem: str) -> NoReturn:
    raise ProfileError(f"{where}: {problem} at {path}. Correct the field, or delete the file and tune again")


def _convert(where: Where, value: object, kind: Any, path: str) -> Any:
    """msgspec.convert with the full path of the bad field in the error."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, tail = str(error).partition(" - at `$")
        _fail(where, path + tail.rstrip("`"), message)


def _settle(where: Where, value: object, kind: type[Problem | KernelConfig], path: str) -> None:
    """Refuse unknown fields of a config or problem, which msgspec lets pass in a dataclass; bring names up to date."""
    if not isinstance(value, dict):
        return
    for name in value.keys() - {field.name for field in fields(kind)}:
        _fail(where, path, f"Object contains unknown field `{name}`")
    # "prefill", in files without a fingerprint, is the kernel for 2 to 16 rows.
    if value.get("kernel_variant") == "prefill":
        value["kernel_variant"] = "prefill4"


def _settle_entries(where: Where, raw: object) -> None:
    """:func:`_settle` for all that the entries hold."""
    problems = raw.get("problems") if isinstance(raw, dict) else None
    for i, entry in enumerate(problems if isinstance(problems, list) else ()):
        if not isinstance(entry, dict):
            continue
        path = f"$.problems[{i}]"
        for name, kind in (("problem", Problem), ("config", KernelConfig), ("default", KernelConfig)):
            _settle(where, entry.get(name), kind, f"{path}.{name}")
        for name in ("timings", "rejected"):
            parts = entry.get(name)
            for j, part in enumerate(parts if isinstance(parts, list) else ()):
                if isinstance(part, dict):
                    _settle(where, part.get("config"), KernelConfig, f"{path}.{name}[{j}].config")
        doubt = entry.get("uncertainty")
        contenders = doubt.get("contenders") if isinstance(doubt, dict) else None
        for j, config in enumerate(contenders if isinstance(contenders, list) else ()):
            _settle(where, config, KernelConfig, f"{path}.uncertainty.contenders[{j}]")


def _items(where: Where, value: object, path: str, pattern: str, wanted: str) -> Iterator[tuple[str, object, str]]:
    """Items of an object whose keys must have a form; each with the path of its value."""
    for key, item in _convert(where, value, dict[str, Any], path).items():
        if not re.fullmatch(pattern, key):
            _fail(where, path, f"key {key[:64]!r} is not {wanted}")
        yield key, item, f'{path}["{key}"]'


def _mapping(where: Where, value: object, path: str) -> dict[float, int]:
    items = _items(where, value, path, _WIDTH, f"a bit width: {', '.join(map(str, codec.WIDTHS))}")
    return {codec.as_width(float(key)): _convert(where, item, _Size, at) for key, item, at in items}


def _widths(where: Where, key: str, path: str) -> tuple[float, ...]:
    widths = tuple(codec.as_width(float(width)) for width in re.findall(_WIDTH, key))
    if list(widths) != sorted(set(widths)):
        _fail(where, path, f"key {key!r} must list its bit widths sorted and distinct")
    return widths


def _table(where: Where, value: object) -> LookupTable:
    table: LookupTable = {}
    # 10 digits hold every number of rows that the kernels take; longer keys are refused before int() sees them.
    for batch, row, at_row in _items(where, value, "$.lookup_table", "[1-9][0-9]{0,9}", "a number of tokens"):
        for hidden, cell, at_cell in _items(where, row, at_row, "[1-9][0-9]{0,7}", "a hidden size"):
            widths = _items(where, cell, at_cell, _WIDTHS, 'bit widths such as "(2, 2.5, 4)" or "(2,)"')
            for key, config, at in widths:
                _settle(where, config, KernelConfig, at)
                columns = table.setdefault(int(batch), {}).setdefault(int(hidden), {})
                columns[_widths(where, key, at)] = _convert(where, config, KernelConfig, at)
    return table


def _check_entry(where: Where, entry: _StoredEntry, path: str) -> None:
    """What calls may have, but layers never select by."""
    problem = entry.problem
    if problem.top_k > problem.experts:
        _fail(where, f"{path}.problem", f"top_k {problem.top_k} is more than the {problem.experts} experts")
    for config in (entry.config, entry.default, *(entry.uncertainty.contenders if entry.uncertainty else ())):
        try:
            kernels.parse_name(config.kernel_name)
        except ValueError as error:  # an error here, not a silent default later
            _fail(where, path, str(error))


def decode(data: bytes, where: Where = "profile") -> AutotuneConfig:
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
    _settle_entries(where, raw)
    stored = _convert(where, raw, _Profile, "$")
    problems: dict[Problem, Entry] = {}
    for i, entry in enumerate(stored.problems):
        _check_entry(where, entry, f"$.problems[{i}]")
        if entry.problem in problems:
            _fail(where, f"$.problems[{i}].problem", "a second entry for the same problem")
        problems[entry.problem] = entry.entry()
    return AutotuneConfig(
        stored.device_name,
        stored.device_family,
        _mapping(where, stored.tile_size_mapping, "$.tile_size_mapping"),
        _mapping(where, stored.simdgroup_mapping, "$.simdgroup_mapping"),
        _table(where, stored.lookup_table),
        stored.adaptation_enabled,
        stored.adaptation_history_len,
        stored.benchmark_count,
        stored.fingerprint,
        stored.source,
        problems,
    )


def _stored(entry: Entry) -> dict[str, Any]:
    """The fields of an entry; without the uncertainty where there is none, as in files from before there was any."""
    stored = structs.asdict(entry)
    if entry.uncertainty is None:
        del stored["uncertainty"]
    return stored


def encode(profile: AutotuneConfig) -> bytes:
    """The JSON text of a profile: sorted, indented, and decoding to an equal profile."""
    table = {
        str(batch): {
            str(hidden): {str(widths): config for widths, config in sorted(cell.items())}
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
        out["fingerprint"] = profile.fingerprint
    if profile.fingerprint is not None or profile.problems or profile.source != "measured":
        out["source"] = profile.source
        ordered = sorted(profile.problems.items(), key=lambda item: repr(item[0]))
        out["problems"] = [{"problem": problem, **_stored(entry)} for problem, entry in ordered]
    return msgspec.json.format(msgspec.json.encode(out), indent=2) + b"\n"
