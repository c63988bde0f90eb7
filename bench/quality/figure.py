"""Quality rows as a table in Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_marlin.storage import atomic

_HUES = ("#1b6ca8", "#c0392b", "#2e8b57", "#b8860b", "#7d3c98", "#555555", "#d2691e", "#008080")


def table(rows: list[dict]) -> str:
    """One line a row by ascending bits; further texts are further columns."""
    others = list(rows[0].get("texts", {}))
    heads = ["model", "bits", "perplexity", "KL", *(f"{what}, {t}" for t in others for what in ("perplexity", "KL"))]
    lines = [f"| {' | '.join([*heads, 'processor s'])} |", "|---" * (len(heads) + 1) + "|"]
    for row in sorted(rows, key=lambda r: r["bits"]):
        figures = [row, *(row["texts"][name] for name in others)]
        shown = [f"{f['perplexity']:.3f} | {f['kl']:.4f}" for f in figures]
        seconds = f"{row['cpu_s']:.3g}" if "cpu_s" in row else ""
        lines.append(f"| {row['label']} | {row['bits']:.3f} | {' | '.join(shown)} | {seconds} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path, unranked: float | None = None) -> None:
    """KL against bits as an SVG: logarithmic KL from 0.001 to 1, bits from 1.5 to 5.

    Args:
        rows: Those to be drawn.
        path: The file.
        unranked: Bits above which the plot says that formats are not compared. Default: ``None``, nowhere.
    """
    kinds = sorted({row["kind"] for row in rows})
    whole = ", whole rates"  # dashed, in the colour of the same kind with half rates
    colours = dict(zip(dict.fromkeys(kind.removesuffix(whole) for kind in kinds), _HUES, strict=False))
    x = lambda bits: 60 + (bits - 1.5) / 3.5 * 520  # noqa: E731
    y = lambda kl: 380 - (np.log10(min(max(kl, 1e-3), 10)) + 3) / top * 340  # noqa: E731
    # A decade more where a row needs it.
    top = 3 if max(row["kl"] for row in rows) <= 1 else 4
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="430" font-family="sans-serif" font-size="12">'
    ]
    if unranked is not None:
        parts.append(
            f'<rect x="{x(unranked):.0f}" y="40" width="{580 - x(unranked):.0f}" height="340" fill="#f3f3f3"/>'
        )
        parts.append(
            f'<text x="{x(unranked) + 6:.0f}" y="54" fill="#777">not ranked: the original is on a 4-bit grid</text>'
        )
    for bits in (2, 2.5, 3, 3.5, 4, 4.5):
        parts.append(f'<text x="{x(bits):.0f}" y="400" text-anchor="middle">{bits}</text>')
    for kl in (0.001, 0.01, 0.1, 1, 10)[: top + 1]:
        parts.append(f'<line x1="60" x2="580" y1="{y(kl):.0f}" y2="{y(kl):.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="54" y="{y(kl) + 4:.0f}" text-anchor="end">{kl}</text>')
    parts.append('<text x="320" y="422" text-anchor="middle">bits per weight, scales included</text>')
    parts.append('<text x="60" y="20">KL divergence from the original</text>')
    for i, kind in enumerate(kinds):
        points = sorted((row["bits"], row["kl"]) for row in rows if row["kind"] == kind)
        line = " ".join(f"{x(b):.1f},{y(k):.1f}" for b, k in points)
        colour, dashes = colours[kind.removesuffix(whole)], ' stroke-dasharray="5 3"' if kind.endswith(whole) else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"{dashes}/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(k):.1f}" r="3.5" fill="{colour}"/>' for b, k in points]
        parts.append(f'<line x1="596" x2="624" y1="{56 + 20 * i}" y2="{56 + 20 * i}" stroke="{colour}"{dashes}/>')
        parts.append(f'<text x="630" y="{60 + 20 * i}" fill="{colour}">{kind}</text>')
    atomic.write_text(path, "\n".join([*parts, "</svg>\n"]))
