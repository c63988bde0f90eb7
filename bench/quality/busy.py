"""How busy a conversion keeps the cores: a timeline of its phases.

Usage: python -m bench.quality.busy MODEL DIR [--bits 2.5 ...] [--windows N] [--output FILE]

What the main thread is at gives the phase. Beside the work of others, the share of the cores is an estimate of what an
idle machine shows: from the process's CPU time and what Linux notes of how long its threads wait for a core
(/proc/self/task/*/schedstat) follows, for each interval of :data:`_PERIOD`, how long it takes where none has to. It is
too high, as the workers of the pool spin while they wait for each other: up to 10 % of the cores where others use both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mlx_marlin.quantize import calibration, convert
from mlx_marlin.storage import atomic

_PERIOD = 0.05  # seconds between two looks: a hundredth of the shortest phase that matters
# A phase by what is on the main thread's stack, "module.function"; the first that fits.
PHASES = {
    "measuring: linears": ("measurement._layer", "runner.parallel"),
    "measuring: Hessians, effects": ("measurement._layer", "jobs.layer_jobs"),
    "measuring: calibration": ("measurement._layer", "runner.run"),
    "measuring: loading": ("measurement._layer", "layered.load"),
    "measuring: disturbed streams": ("measurement._layer",),
    "measuring: sensitivities": ("sensitivity.sensitivities",),
    "quantizing: linears": ("layers._layer", "runner.parallel"),
    "quantizing: Hessians": ("layers._layer", "jobs.layer_jobs"),
    "quantizing: calibration": ("layers._layer", "runner.run"),
    "quantizing: loading": ("layers._layer", "layered.load"),
    "quantizing: installing": ("layers._layer",),
    "head": ("layers.head",),
    "others": ("layers.others",),
    "states to disk": ("job_state.follow", "job_state.write_states"),
    "embeddings": ("layered.embeddings",),
    "allocation": ("conversion._allocation",),
    "writing": ("writer.assemble",),
    "checkpoint's digest": ("resume.content_of",),
    "opening": ("measurement.opened_runner",),
}


@dataclass
class Span:
    """Time in one phase.

    Attributes:
        phase: Its name.
        start: Seconds from the beginning.
        wall: Seconds.
        cpu: Seconds of CPU time.
        waiting: Seconds in which threads waited for a core.
        alone: Seconds that it takes where no thread has to wait for others' work.
    """

    phase: str
    start: float
    wall: float = 0.0
    cpu: float = 0.0
    waiting: float = 0.0
    alone: float = 0.0

    def add(self, other: Span) -> None:
        """Count more time."""
        self.wall += other.wall
        self.cpu += other.cpu
        self.waiting += other.waiting
        self.alone += other.alone


class Sampler:
    """Looks at the process until it is stopped.

    Args:
        cores: How many count.

    Attributes:
        spans: One for each stretch of time in one phase.
        others: Cores that other processes used, on average.
    """

    def __init__(self, cores: int):
        self.cores, self.others = cores, 0.0
        self.spans: list[Span] = []
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._waits: dict[str, int] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Sampler:
        self._begin = time.perf_counter(), _used_by_others()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        self._thread.join()
        start, used = self._begin
        self.others = (_used_by_others() - used) / (time.perf_counter() - start)

    def _look(self) -> None:
        begin = then = time.perf_counter()
        cpu = time.process_time()
        self._waited()
        while not self._stopped.wait(_PERIOD):
            now, cpu_now = time.perf_counter(), time.process_time()
            span = Span(self._phase(), then - begin, now - then, cpu_now - cpu, self._waited())
            # Of more threads than cores some wait whatever else runs.
            share = span.cpu / (span.cpu + span.waiting) if span.waiting else 1.0
            span.alone = max(span.cpu / self.cores, span.wall * share)
            then, cpu = now, cpu_now
            if not self.spans or self.spans[-1].phase != span.phase:
                self.spans.append(Span(span.phase, span.start))
            self.spans[-1].add(span)

    def _waited(self) -> float:
        """Seconds that threads waited for a core since the last look. Of a thread that ended, the last are lost."""
        waits = {}
        for thread in os.listdir("/proc/self/task"):
            try:
                waits[thread] = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1])
            except OSError:  # it has ended
                continue
        since = sum(wait - self._waits.get(thread, 0) for thread, wait in waits.items())
        self._waits = waits
        return since / 1e9

    def _phase(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._main)
        stack = set()
        while frame is not None:
            stack.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            frame = frame.f_back
        return next((phase for phase, functions in PHASES.items() if stack.issuperset(functions)), "other")


def _used_by_others() -> float:
    """CPU seconds of all processes but this, since the machine started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def line(span: Span, cores: int) -> str:
    """A span as a row of a table."""
    return (
        f"| {span.phase} | {span.start:.1f} | {span.wall:.1f} | {span.cpu:.1f} | {span.waiting:.1f} | "
        f"{span.alone:.1f} | {100 * span.cpu / (cores * span.alone or 1):.0f} % |"
    )


def sums(spans: list[Span]) -> list[Span]:
    """The phases, the longest first, and all together."""
    found: dict[str, Span] = {}
    for span in spans:
        for name in (span.phase, "all"):
            found.setdefault(name, Span(name, span.start)).add(span)
    return sorted(found.values(), key=lambda span: -span.alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5])
    parser.add_argument("--windows", type=int, default=calibration.WINDOWS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    calibration.WINDOWS = options.windows
    cores = len(os.sched_getaffinity(0))
    bits = options.bits[0] if len(options.bits) == 1 else options.bits
    with Sampler(cores) as sampler:
        convert(options.model, options.directory, bits=bits)
    titles = ("phase", "start, s", "s", "CPU, s", "waiting, s", "alone, s", f"busy, of {cores} cores")
    head = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    shown = [span for span in sampler.spans if span.wall > 4 * _PERIOD]
    rows = [*head, *(line(span, cores) for span in shown), "", *head, *(line(s, cores) for s in sums(sampler.spans))]
    print("\n".join([*rows, "", f"other processes used {sampler.others:.2f} cores"]))
    if options.output:
        value = {"model": options.model.name, "bits": options.bits, "windows": options.windows, "cores": cores}
        value["others"] = round(sampler.others, 2)
        value |= {"spans": [{k: v if k == "phase" else round(v, 2) for k, v in vars(s).items()} for s in sampler.spans]}
        atomic.write_text(options.output, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
