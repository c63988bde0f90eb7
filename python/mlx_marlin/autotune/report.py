"""The results of tuning: a table with the explanations that it needs, and everything as JSON for programs.

Gains are time saved everywhere: in percent of the default config's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from ..kernels import Problem, rows_label
from ..profile.schema import Entry
from .check import Finding
from .labels import config_label

UNDECIDED = "undecided: another config looked faster within the noise; the default stays; try more --iterations"
_SAVED = "time saved: of the default's, with its 95 % interval; nothing: no other config was faster"


def saved_percent(ratio: float) -> float:
    """Time saved, in percent of the default's, by a config that takes ``ratio`` of it."""
    return 100 * (1 - ratio)


def _saved(entry: Entry) -> tuple[float, float, float]:
    """Time that an entry's config saves, with its 95 % interval."""
    ratio, low, high = entry.ratio
    return saved_percent(ratio), saved_percent(high), saved_percent(low)


def tuned_text(entries: Mapping[Problem, Entry], names: Mapping[Problem, str]) -> str:
    """A line per entry, at most 100 columns: what runs, how long it takes and what that saves.

    Args:
        entries: What tuning found.
        names: Of the problems.
    """
    rows = [
        {
            "problem": names[problem],
            "rows": problem.rows,
            "ms": e.samples.median_ms,
            "time saved": _gain(e),
            "config": config_label(e.config),
        }
        for problem, e in entries.items()
    ]
    legend = [UNDECIDED] if any(e.decision == "undecided" for e in entries.values()) else []
    return "\n".join([_aligned(rows), "", _SAVED, *legend])


def _gain(entry: Entry) -> str:
    if entry.decision != "faster":
        return "nothing" if entry.decision == "default" else entry.decision
    return "{:.1f} % ({:.1f} to {:.1f})".format(*_saved(entry))


def tuned_json(
    entries: Mapping[Problem, Entry], failed: Mapping[Problem, str], names: Mapping[Problem, str]
) -> list[dict]:
    """Every figure of every entry; problems that could not be tuned with the reason."""
    rows = [
        {
            **_identified(problem, names),
            "config": asdict(e.config),
            "default": asdict(e.default),
            "best_ms": e.samples.median_ms,
            "default_ms": e.baseline.median_ms,
            "saved_percent": _saved(e)[0],
            "saved_percent_interval": list(_saved(e)[1:]),
            "decision": e.decision,
            "verdict": e.verdict,
            "objective": dict(zip(("latency", "throughput", "memory"), e.objective)),
            "measured": len(e.timings),
            "rejected": [{"config": asdict(r.config), "reason": r.reason} for r in e.rejected],
        }
        for problem, e in entries.items()
    ]
    return rows + [{**_identified(problem, names), "failed": reason} for problem, reason in failed.items()]


def checked_text(findings: Iterable[Finding], names: Mapping[Problem, str]) -> str:
    """A line per finding, at most 100 columns, and below them what was found."""
    rows, details = [], []
    for f in findings:
        is_default, now = f.entry.config == f.entry.default, _saved_now(f)
        rows.append(
            {
                "problem": names[f.problem],
                "rows": f.problem.rows,
                "result": _result(f),
                "ms": f.now_ms,
                "time saved": "" if now is None else "is the default" if is_default else f"{now:.1f} %",
                "when tuned": "is the default" if is_default else f"{_saved(f.entry)[0]:.1f} %",
            }
        )
        if f.regression or f.note:
            details.append(f"{names[f.problem]}, {rows_label(f.problem.rows)}: {f.regression or f.note}")
    return "\n".join([_aligned(rows), *([""] if details else []), *details])


def _result(f: Finding) -> str:
    if f.regression:
        return "slower" if f.now_ms is not None else "fails"
    return "ok" if not f.note else "not measured" if f.now_ms is None else "not compared"


def _saved_now(f: Finding) -> float | None:
    return None if f.now_ms is None or not f.default_ms else saved_percent(f.now_ms / f.default_ms)


def checked_json(findings: Iterable[Finding], names: Mapping[Problem, str]) -> list[dict]:
    """Every figure of every finding."""
    return [
        {
            **_identified(f.problem, names),
            "config": asdict(f.entry.config),
            "default": asdict(f.entry.default),
            "stored_ms": f.entry.samples.median_ms,
            "stored_saved_percent": _saved(f.entry)[0],
            "now_ms": f.now_ms,
            "default_ms": f.default_ms,
            "saved_percent": _saved_now(f),
            "regression": f.regression,
            "note": f.note,
        }
        for f in findings
    ]


def _identified(problem: Problem, names: Mapping[Problem, str]) -> dict:
    return {"label": names[problem], "rows": problem.rows, "problem": asdict(problem)}


def _aligned(rows: list[dict]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [list(rows[0])] + [[_cell(v) for v in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [not isinstance(v, str) for v in rows[0].values()]
    lines = ("  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
