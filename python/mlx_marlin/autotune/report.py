"""What the tuning command says about its results: rows of a table, and the same in full for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from ..kernels import Problem
from ..profile.schema import Entry
from .check import Finding
from .labels import config_label, problem_label


def tuned_table(entries: Mapping[Problem, Entry]) -> list[dict]:
    """A row per entry: best and default config, and the gain with its 95 % interval."""
    rows = []
    for problem, e in entries.items():
        gain, low, high = (100 * (1 / r - 1) for r in (e.ratio[0], e.ratio[2], e.ratio[1]))
        rows.append(
            {
                "problem": problem_label(problem),
                "rows": problem.rows,
                "best": config_label(e.config),
                "default": config_label(e.default),
                "best_ms": e.samples.median_ms,
                "default_ms": e.baseline.median_ms,
                "gain": f"{gain:+.1f} % ({low:+.1f} to {high:+.1f})" if e.decision == "faster" else "0",
                "decision": e.decision,
                "measured": len(e.timings),
                "rejected": len(e.rejected),
            }
        )
    return rows


def tuned_json(entries: Mapping[Problem, Entry], failed: Mapping[Problem, str]) -> list[dict]:
    """Every figure of every entry; problems that could not be tuned with the reason."""
    rows = [
        {
            **_identified(problem),
            "config": asdict(e.config),
            "default": asdict(e.default),
            "best_ms": e.samples.median_ms,
            "default_ms": e.baseline.median_ms,
            "ratio": e.ratio[0],
            "interval": list(e.ratio[1:]),
            "decision": e.decision,
            "verdict": e.verdict,
            "objective": dict(zip(("latency", "throughput", "memory"), e.objective)),
            "measured": len(e.timings),
            "rejected": [{"config": asdict(r.config), "reason": r.reason} for r in e.rejected],
        }
        for problem, e in entries.items()
    ]
    return rows + [{**_identified(problem), "failed": reason} for problem, reason in failed.items()]


def checked_table(findings: list[Finding]) -> list[dict]:
    """A row per finding."""
    return [
        {
            "problem": problem_label(f.problem),
            "rows": f.problem.rows,
            "config": config_label(f.entry.config),
            "stored_ms": f.entry.samples.median_ms,
            "now_ms": f.now_ms,
            "default_ms": f.default_ms,
            "regression": f.regression or f.note,
        }
        for f in findings
    ]


def checked_json(findings: list[Finding]) -> list[dict]:
    """Every figure of every finding."""
    return [
        {
            **_identified(f.problem),
            "config": asdict(f.entry.config),
            "default": asdict(f.entry.default),
            "stored_ms": f.entry.samples.median_ms,
            "stored_ratio": f.entry.ratio[0],
            "now_ms": f.now_ms,
            "default_ms": f.default_ms,
            "regression": f.regression,
            "note": f.note,
        }
        for f in findings
    ]


def _identified(problem: Problem) -> dict:
    return {"label": problem_label(problem), "rows": problem.rows, "problem": asdict(problem)}


def as_text(rows: list[dict]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [list(rows[0])] + [
        ["" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [not isinstance(v, str) for v in rows[0].values()]
    lines = ("  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
