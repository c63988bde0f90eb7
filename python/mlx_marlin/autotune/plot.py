"""Figures of tuning results. The only module that imports matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..kernels import VARIANTS
from .tuner import AutotuneConfig, BenchmarkResult


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def latency_by_variant(results: Mapping[int, Sequence[BenchmarkResult]], ax: Axes | None = None) -> Axes:
    """Latency over batch size: for each variant its fastest config.

    Args:
        results: What ``benchmark_all`` returns for one layer: ``{batch_size: results}``.
        ax: Where to draw. Default: ``None``, a new figure.
    """
    ax = _axes(ax)
    for variant in VARIANTS:
        best = {
            batch: min((r.latency_ms for r in timed if r.config.kernel_variant == variant), default=None)
            for batch, timed in sorted(results.items())
        }
        points = [(batch, latency) for batch, latency in best.items() if latency is not None]
        if points:
            ax.plot(*zip(*points), marker="o", label=variant)
    ax.set(xscale="log", yscale="log", xlabel="batch size (rows)", ylabel="latency (ms)")
    ax.set_xticks(sorted(results), labels=map(str, sorted(results)))
    ax.minorticks_off()
    ax.legend()
    return ax


def chosen_configs(config: AutotuneConfig, ax: Axes | None = None) -> Axes:
    """Heat map of a lookup table: batch sizes by layers, coloured by variant, with tiles and simdgroups
    written in.

    Args:
        config: A profile, such as ``MixedBPWAutoTuner.config``.
        ax: Where to draw. Default: ``None``, a new figure.

    Raises:
        ValueError: If the lookup table is empty.
    """
    cells = {
        (batch, (hidden, widths)): chosen
        for batch, row in config.lookup_table.items()
        for hidden, cell in row.items()
        for widths, chosen in cell.items()
    }
    if not cells:
        raise ValueError("the lookup table is empty: benchmark a layer first")
    ax = _axes(ax)
    batches = sorted({batch for batch, _ in cells})
    layers = sorted({layer for _, layer in cells})
    missing = float("nan")
    grid = [
        [VARIANTS.index(cells[b, layer].kernel_variant) if (b, layer) in cells else missing for layer in layers]
        for b in batches
    ]
    ax.imshow(grid, cmap="Pastel1", vmin=-0.5, vmax=len(VARIANTS) - 0.5, aspect="auto")
    for (batch, layer), chosen in cells.items():
        text = f"{chosen.kernel_variant}\n{chosen.tile_size_m} x {chosen.tile_size_n}, {chosen.simdgroups}"
        ax.text(layers.index(layer), batches.index(batch), text, ha="center", va="center", fontsize="small")
    ax.set_xticks(range(len(layers)), [f"hidden {h}\n{', '.join(map(str, w))} bits" for h, w in layers])
    ax.set_yticks(range(len(batches)), list(map(str, batches)))
    ax.set_ylabel("batch size (rows)")
    return ax


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in one coordinate without losing in the other, ascending in the
    first.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def latency_against_memory(results: Sequence[BenchmarkResult], ax: Axes | None = None) -> Axes:
    """Every timed config by latency and memory, with the Pareto front.

    Args:
        results: Of one layer and batch size.
        ax: Where to draw. Default: ``None``, a new figure.
    """
    ax = _axes(ax)
    for variant in VARIANTS:
        points = [(r.latency_ms, r.memory_footprint_mb) for r in results if r.config.kernel_variant == variant]
        if points:
            ax.scatter(*zip(*points), label=variant, alpha=0.6)
    front = pareto_front((r.latency_ms, r.memory_footprint_mb) for r in results)
    ax.step(*zip(*front), where="post", color="black", label="Pareto front")
    ax.set(xlabel="latency (ms)", ylabel="memory (MB)")
    ax.legend()
    return ax
