"""What a tuned profile holds, and how two of them merge."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from ..device.fingerprint import Fingerprint, canonical_name, device_family
from ..device.machine import device_name, fingerprint
from ..kernels import PROJECTIONS, KernelConfig, Problem
from ..kernels.search_space import SIMDGROUPS, TILE_SIZES
from ..measure.race import Decision
from .uncertainty import Uncertainty

LookupTable = dict[int, dict[int, dict[tuple[float, ...], KernelConfig]]]

# A compiler's message can be a whole log; its beginning says what is wrong.
MAX_REASON = 4096

# What annotations ask for is checked where a profile is read from a file.
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Positive = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
_Ratio = Annotated[float, msgspec.Meta(gt=0.0, le=1e15)]


class ProfileError(ValueError):
    """A profile that cannot be read, or must not be used or overwritten here."""


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples of one config.

    Attributes:
        n: Number of samples; 0 where the time is predicted.
        median_ms: Median, in milliseconds.
        spread: Interquartile range over the median.
    """

    n: _Count
    median_ms: _Positive
    spread: _Positive


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One candidate's timing, with its memory and its largest error against the codec.

    Attributes:
        config: The candidate.
        timing: Its samples.
        error: Largest error against the codec over the output's root mean square; -1 where not checked.
        memory_mb: Peak memory of a call beyond its inputs and weights, in MB (1e6 bytes).
    """

    config: KernelConfig
    timing: Timing
    error: Annotated[float, msgspec.Meta(ge=-1.0, le=1e30)] = -1.0
    memory_mb: _Positive = 0.0


class Rejected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate that was not considered, and why."""

    config: KernelConfig
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]

    @classmethod
    def because(cls, config: KernelConfig, reason: str) -> Rejected:
        """With the reason cut to what a profile holds, and without characters that no file can have."""
        return cls(config, reason.encode("utf-8", "replace").decode()[:MAX_REASON])


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tuning found for one problem.

    Attributes:
        config: The config that runs.
        samples: Its fresh samples, taken after it was picked.
        default: The default config at the time.
        baseline: The default's samples, interleaved with ``samples``.
        ratio: Time of ``config`` over time of ``default``, with its 95 % interval: ``(ratio, low, high)``.
        decision: ``"faster"`` (a challenger won by the objective), ``"default"`` (no challenger is better by the
            margin) or ``"undecided"`` (one looked better, but the noise did not allow a decision); both keep the
            default.
        verdict: ``"correct"`` if ``config`` was compared with the codec, ``"unchecked"`` in predicted profiles.
        timestamp: Seconds since the epoch.
        timings: Every candidate that was measured.
        rejected: Every candidate that was not, with its reason.
        objective: Weights of latency, throughput and memory that the decision was made with.
        over_control: Time of ``config`` over that of a fixed product of MLX's, interleaved, with its 95 % interval:
            what a later check compares with, whatever the machine's speed then. ``None`` where not measured.
        uncertainty: How far the time can be off in a predicted profile, where that is more than 25 %. ``None``
            elsewhere.
    """

    config: KernelConfig
    samples: Timing
    default: KernelConfig
    baseline: Timing
    ratio: tuple[_Ratio, _Ratio, _Ratio]
    decision: Decision
    verdict: Literal["correct", "unchecked"]
    timestamp: _Positive
    timings: tuple[Measured, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    objective: tuple[_Positive, _Positive, _Positive] = (1.0, 0.0, 0.0)
    over_control: tuple[_Ratio, _Ratio, _Ratio] | None = None
    uncertainty: Uncertainty | None = None


@dataclass
class AutotuneConfig:
    """A profile: the tuned table of one machine.

    Attributes:
        device_name: Such as "M4 Max".
        device_family: "M1" to "M5", "CPU" or "Unknown".
        tile_size_mapping: Tile size by bit width, for the defaults.
        simdgroup_mapping: Simdgroups by bit width, for the defaults.
        lookup_table: ``{tokens: {hidden: {sorted distinct bit widths: KernelConfig}}}``.
        adaptation_enabled: Whether ``adapt_selection`` may answer.
        adaptation_history_len: Samples kept per key.
        benchmark_count: Candidates measured so far.
        fingerprint: The machine; ``None`` in files that only name a device.
        source: ``"measured"`` or ``"predicted"``.
        problems: The table that layers select from. ``lookup_table`` is its projection.
    """

    device_name: str
    device_family: str
    tile_size_mapping: dict[float, int] = field(default_factory=lambda: dict(TILE_SIZES))
    simdgroup_mapping: dict[float, int] = field(default_factory=lambda: dict(SIMDGROUPS))
    lookup_table: LookupTable = field(default_factory=dict)
    adaptation_enabled: bool = True
    adaptation_history_len: int = 100
    benchmark_count: int = 0
    fingerprint: Fingerprint | None = None
    source: str = "measured"
    problems: dict[Problem, Entry] = field(default_factory=dict)

    @classmethod
    def of_machine(cls, device: str) -> AutotuneConfig:
        """An empty profile of this machine."""
        name = device_name(device)
        return cls(name, device_family(name), fingerprint=fingerprint(device))

    def add(self, problem: Problem, entry: Entry) -> None:
        """Enter a result and project it onto ``lookup_table``."""
        self.problems[problem] = entry
        project(self, {table_key(problem)})


def table_key(problem: Problem) -> tuple[int, int, tuple[float, ...]]:
    return problem.rows, problem.hidden, problem.widths


def projected(problems: Mapping[Problem, Entry]) -> LookupTable:
    """The table of problems of one kind.

    Several may share a key; of the configs that tuning chose for one of them, the one with the lowest geometric mean of
    its times over all of them is entered.
    """
    groups = defaultdict(list)
    for problem, entry in problems.items():
        groups[table_key(problem)].append(entry)
    table: LookupTable = {}
    for (rows, hidden, widths), entries in groups.items():
        best = min(_chosen(entries), key=lambda config: _mean_log_time(config, entries))
        table.setdefault(rows, {}).setdefault(hidden, {})[widths] = best
    return table


def project(profile: AutotuneConfig, keys: set | None = None) -> None:
    """Bring ``lookup_table`` up to date with ``problems``.

    Kinds of problems are timed with different work behind the same key: they do not mix, and of the keys that several
    pose experts of three matrices have theirs, then those of two. Nor do the accuracies mix, of which float32 has the
    keys: its configs run both.

    Args:
        keys: ``(tokens, hidden, widths)`` to bring up to date. Default: all that ``problems`` has.
    """
    asked = {p: e for p, e in profile.problems.items() if keys is None or table_key(p) in keys}
    for kind in PROJECTIONS:
        for accuracy in ("half", "float32"):
            of_both = {p: e for p, e in asked.items() if (p.kind, p.accuracy) == (kind, accuracy)}
            _update(profile.lookup_table, projected(of_both))


def _update(table: LookupTable, newer: LookupTable) -> None:
    for batch, row in newer.items():
        for hidden, cell in row.items():
            table.setdefault(batch, {}).setdefault(hidden, {}).update(cell)


def _chosen(entries: list[Entry]) -> list[KernelConfig]:
    return list(dict.fromkeys(config for e in entries for config in (e.config, e.default)))


def _mean_log_time(config: KernelConfig, entries: list[Entry]) -> tuple[int, float, int]:
    """Sort key: configs timed for every problem first, then by mean log time, then those that more entries chose."""
    logs = []
    for entry in entries:
        times = {
            entry.default: entry.baseline,
            **{m.config: m.timing for m in entry.timings},
            entry.config: entry.samples,
        }
        if config in times:
            logs.append(math.log(max(times[config].median_ms, 1e-9)))
    mean = sum(logs) / len(logs)
    # With one problem the decision stands: the default was kept on evidence even where its median is the larger.
    if len(entries) == 1:
        mean = 0.0 if config == entries[0].config else 1.0
    return len(entries) - len(logs), mean, -sum(e.config == config for e in entries)


def merge(older: AutotuneConfig, newer: AutotuneConfig) -> AutotuneConfig:
    """Union of two profiles of one machine: per problem the later entry, elsewhere what ``newer`` says.

    Raises:
        ProfileError: If they are profiles of different machines or kernels.
    """
    if not same_origin(older, newer):
        raise ProfileError(
            f"cannot merge a profile of {describe(newer)} into one of {describe(older)}: "
            "timings hold for one machine and one build of the kernels only"
        )
    problems = dict(older.problems)
    for problem, entry in newer.problems.items():
        if problem not in problems or _order(entry) >= _order(problems[problem]):
            problems[problem] = entry
    table: LookupTable = {}
    for source in (older.lookup_table, newer.lookup_table):
        _update(table, source)
    timed = sum(len(e.timings) for e in problems.values())
    merged = AutotuneConfig(
        newer.device_name,
        newer.device_family,
        dict(newer.tile_size_mapping),
        dict(newer.simdgroup_mapping),
        table,
        newer.adaptation_enabled,
        newer.adaptation_history_len,
        max(older.benchmark_count, newer.benchmark_count, timed),
        newer.fingerprint,
        newer.source,
        problems,
    )
    project(merged)
    return merged


def _order(entry: Entry) -> tuple:
    """A total order, so that merging does not depend on who is merged first."""
    return entry.timestamp, entry.samples.n, repr(entry)


def same_origin(a: AutotuneConfig, b: AutotuneConfig) -> bool:
    """Whether two profiles hold timings of the same machine and kernels."""
    if a.fingerprint is None or b.fingerprint is None:
        same_name = canonical_name(a.device_name) == canonical_name(b.device_name)
        return a.fingerprint is b.fingerprint and same_name and a.source == b.source
    return (
        a.fingerprint.same_machine(b.fingerprint)
        and a.fingerprint.kernel_hash == b.fingerprint.kernel_hash
        and a.source == b.source
    )


def describe(profile: AutotuneConfig) -> str:
    """The machine of a profile, for messages."""
    f = profile.fingerprint
    if f is None:
        return f"{profile.device_name} (no fingerprint)"
    return f"{profile.device_name}, {f.cores} cores, kernels {f.kernel_hash}, {profile.source}"
