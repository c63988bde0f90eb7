"""Figures of tuning results, a question each. The only module that imports matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.ticker import FixedLocator, NullLocator

from ..kernels import VARIANTS, rows_label
from ..profile.schema import Entry
from .report import saved_percent
from .tuner import BenchmarkResult

_COLOURS = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green", "tab:red")))
# Ticks of times in relation to another, for data that span less than a factor of 4, and for others.
_FINE_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4)
_RATIOS = tuple(2.0**i for i in range(-6, 11))
# Of the space between two batch sizes, what the points of one of them are spread over, so that they can be told apart.
_SPREAD = 0.6


def _axes(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _rows_on_x(ax: Axes, batch_sizes: Sequence[int]) -> None:
    """Batch sizes in equal steps, as they grow by factors."""
    ax.set_xticks(range(len(batch_sizes)), labels=[f"{rows:,}" for rows in batch_sizes])
    ax.set_xlim(-0.5, len(batch_sizes) - 0.5)
    ax.set_xlabel("rows of a call")


def _ratios_on_y(ax: Axes) -> None:
    """A logarithmic axis of ratios, with ticks such as "1.5 x"."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = _FINE_RATIOS if high < 4 * low else _RATIOS
    ax.yaxis.set_major_locator(FixedLocator([r for r in ticks if low <= r <= high]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    ax.grid(axis="y", alpha=0.3)


def _legend_beside(ax: Axes, title: str) -> None:
    """A legend that covers no point."""
    ax.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def variants_by_rows(results: Mapping[int, Sequence[BenchmarkResult]], ax: Axes | None = None) -> Axes:
    """Which variant is fastest at each number of rows: the fastest config of each, over the fastest of all.

    Args:
        results: What ``benchmark_all`` returns for one layer: ``{batch_size: results}``.
        ax: Where to draw. Default: ``None``, a new figure.
    """
    ax = _axes(ax)
    sizes = sorted(rows for rows, timed in results.items() if timed)
    fastest = [min(r.latency_ms for r in results[rows]) for rows in sizes]
    for variant in VARIANTS:
        points = []
        for i, rows in enumerate(sizes):
            times = [r.latency_ms for r in results[rows] if r.config.kernel_variant == variant]
            if times:
                points.append((i, min(times) / fastest[i]))
        if points:
            ax.plot(*zip(*points), marker="o", color=_COLOURS[variant], label=variant)
    _rows_on_x(ax, sizes)
    labels = [f"{rows:,}\n{_milliseconds(ms)}" for rows, ms in zip(sizes, fastest)]
    ax.set_xticks(range(len(sizes)), labels=labels)
    ax.set_xlabel("rows of a call, and its fastest time")
    ax.set_ylabel("time over that of the fastest config")
    _ratios_on_y(ax)
    _legend_beside(ax, "variant")
    ax.set_title("Which variant is fastest?")
    return ax


def _milliseconds(ms: float) -> str:
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.2f} ms" if ms < 100 else f"{ms:.0f} ms"


def configs_by_rows(entries: Mapping[int, Entry], ax: Axes | None = None) -> Axes:
    """What another config than the default would cost: a point for every config that was timed.

    Args:
        entries: What tuning found for one layer, by batch size.
        ax: Where to draw. Default: ``None``, a new figure.
    """
    ax = _axes(ax)
    sizes = sorted(entries)
    for variant in VARIANTS:
        points = []
        for i, rows in enumerate(sizes):
            entry = entries[rows]
            timed = sorted(entry.timings, key=lambda m: m.timing.median_ms)
            default = next(m.timing.median_ms for m in timed if m.config == entry.default)
            for place, m in enumerate(timed):
                x = i + _SPREAD * (place / max(1, len(timed) - 1) - 0.5)
                if m.config.kernel_variant == variant:
                    points.append((x, m.timing.median_ms / default))
        if points:
            places, ratios = zip(*points)
            ax.scatter(places, ratios, s=26, alpha=0.75, color=_COLOURS[variant], label=variant)
    ax.axhline(1.0, color="black", linewidth=1, label="the default")
    _rows_on_x(ax, sizes)
    ax.set_ylabel("time over that of the default")
    _ratios_on_y(ax)
    _legend_beside(ax, "configs,\nfastest first")
    ax.set_title("What would another config than the default cost?")
    return ax


def chosen_configs(entries: Mapping[str, Mapping[int, Entry]], ax: Axes | None = None) -> Axes:
    """What tuning chose and what that saves: a cell per layer and batch size, coloured by variant.

    Args:
        entries: What tuning found, by the layer's name and by batch size.
        ax: Where to draw. Default: ``None``, a new figure.

    Raises:
        ValueError: If there is no entry.
    """
    cells = {(name, rows): e for name, found in entries.items() for rows, e in found.items()}
    if not cells:
        raise ValueError("there is no entry to show: benchmark a layer first")
    sizes, layers = sorted({rows for _, rows in cells}), list(entries)
    ax = _axes(ax, 1.5 + 2.2 * len(layers), 1.2 + 0.6 * len(sizes))
    missing = float("nan")
    grid = [
        [VARIANTS.index(cells[n, rows].config.kernel_variant) if (n, rows) in cells else missing for n in layers]
        for rows in sizes
    ]
    colours = ListedColormap([to_rgba(_COLOURS[variant], 0.3) for variant in VARIANTS])
    ax.imshow(grid, cmap=colours, vmin=-0.5, vmax=len(VARIANTS) - 0.5, aspect="auto")
    for edges, line in ((len(sizes), ax.axhline), (len(layers), ax.axvline)):
        for i in range(1, edges):
            line(i - 0.5, color="white", linewidth=2)
    for (name, rows), entry in cells.items():
        c = entry.config
        text = f"{c.kernel_variant} {c.tile_size_m} x {c.tile_size_n}, {c.simdgroups}\n{_saves(entry)}"
        weight = "bold" if entry.decision == "faster" else "normal"
        ax.text(
            layers.index(name), sizes.index(rows), text, ha="center", va="center", fontsize="small", fontweight=weight
        )
    ax.set_xticks(range(len(layers)), labels=layers)
    ax.set_yticks(range(len(sizes)), labels=[rows_label(rows) for rows in sizes])
    ax.tick_params(length=0)
    ax.set_xlabel("layer")
    ax.set_title("What did tuning choose, and what does it save?")
    return ax


def _saves(entry: Entry) -> str:
    if entry.decision != "faster":
        return {"default": "the default", "undecided": "the default, undecided"}[entry.decision]
    ratio, low, high = entry.ratio
    return f"saves {saved_percent(ratio):.0f} % ({saved_percent(high):.0f} to {saved_percent(low):.0f})"


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
    """What a faster config costs in memory, with the Pareto front. On a CPU every config takes the same memory.

    Args:
        results: Of one layer and batch size.
        ax: Where to draw. Default: ``None``, a new figure.
    """
    ax = _axes(ax)
    for variant in VARIANTS:
        points = [(r.latency_ms, r.memory_footprint_mb) for r in results if r.config.kernel_variant == variant]
        if points:
            ax.scatter(*zip(*points), color=_COLOURS[variant], label=variant, alpha=0.75)
    front = pareto_front((r.latency_ms, r.memory_footprint_mb) for r in results)
    ax.step(*zip(*front), where="post", color="black", label="Pareto front")
    ax.set(xlabel="latency (ms)", ylabel="memory of weights and a call (MB)", title="What does speed cost in memory?")
    ax.legend()
    return ax
