"""What every width of every linear would cost: measured once for a model, along its original."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .. import codec
from ..storage import atomic
from . import calibration as texts
from .allocation import MODES, Allocation, Item, expected_elsewhere, least_loss
from .budget import candidate_widths, measured_sizes, model_sizes, stored_bits
from .job_state import JobState, Pass, follow
from .jobs import Job, Original, job_bytes, layer_jobs, seed_of
from .layered import LayeredModel
from .plan import items_from, items_value, plan_table
from .progress import Clock, Progress
from .resume import check_measurement, content_of, opened_measurement, stored_measurement
from .runner import BATCH, Runner
from .sensitivity import disturbed, sensitivities
from .settings import all_widths, check_bits
from .source import Source
from .spill import States
from .weight import expected_loss, prepare

_SENSITIVITY = "sensitivity.json"
_log = logging.getLogger("mlx_marlin.quantize")


def measure(
    model: str | Path,
    job: str | Path,
    *,
    codebook: str = "mul1",
    calibration: str | Path | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Measure what every width of every linear of a checkpoint would cost, for :func:`allocate` and :func:`convert`.

    What an earlier run measured in ``job`` is used, if it was of the same checkpoint by content and the same arguments.

    Args:
        model: Directory of a Hugging Face checkpoint; see :func:`convert`.
        job: Directory of the measurement, made if need be. :func:`convert` also keeps there what other sizes can use.
        codebook: ``"mul1"``, ``"mcg"`` or ``"3inst"``. Default: ``"mul1"``.
        calibration: Text file; the bundled text if ``None``. Default: ``None``.
        seed: Seed of everything random. Default: ``0``.
        trust_remote_code: Whether a tokenizer may run code from the checkpoint. Default: ``False``.
        progress: Called with a :class:`Progress` after each finished piece of work.

    Raises:
        ValueError: If an argument or the checkpoint is not fit for this, ``job`` was begun with something else, or is
            in use.
        FileExistsError: If ``job`` holds other files.
        OSError: If a file cannot be read or written; what is done stays.
    """
    from threadpoolctl import threadpool_limits

    codec.check_codebook(codebook)
    clock = Clock(progress)
    runner = opened_runner(model, calibration, trust_remote_code, clock)
    model_sizes(runner.model, codebook, all_widths(codebook))  # there is something to quantize
    check_measurement(Path(job))
    clock.total = float(runner.count)
    with threadpool_limits(1, "blas"):  # sums must not depend on the machine's cores; experts run side by side
        content = content_of(runner.source, runner.tokens, clock.tick)
        with opened_measurement(Path(job), content, codebook, seed, teller(clock)) as state:
            Measurement(state, runner, codebook, seed).items()


def allocate(
    job: str | Path,
    bits: float,
    *,
    mixed: str = "per-expert",
    half_rates: bool = True,
    allocation: str | Path | None = None,
) -> Allocation:
    """Give every linear of a measured model its width, so that the loss is least at a size.

    Args:
        job: Directory of the measurement, by :func:`measure` or :func:`convert`.
        bits: Stored bits per weight of the quantized layers, 1 to 8, scales included, without the head.
        mixed: ``"per-expert"``, ``"per-layer"`` or ``"uniform"``; see :func:`convert`. Default: ``"per-expert"``.
        half_rates: Whether linears may have 1.5, 2.5 and 3.5 bits. Default: ``True``.
        allocation: File that the plan is written to: a table that may be edited and given to :func:`convert`. Default:
            ``None``.

    Returns:
        Allocation: the widths, the stored bits per weight, the loss and its proven bound.

    Raises:
        ValueError: If ``job`` holds no complete measurement, or the size is none or cannot be met.
        FileExistsError: If the file is there.
    """
    check_bits(float(bits))
    path = None if allocation is None else Path(allocation)
    if path is not None and path.exists():
        raise FileExistsError(f"{path} is there already; choose another name for the plan")
    layers = measured_items(stored_measurement(Path(job), _log.warning))
    if layers is None:
        raise ValueError(f"the measurement in {job} is not complete; mlx_marlin-convert measure goes on with it")
    items = [item for layer in layers for item in layer]
    allowed = [k for k in items[0].bits if half_rates or not codec.is_half_rate(k)]
    found = allocated(items, float(bits), mixed, allowed)
    if path is not None:
        atomic.write_text(path, plan_table(found))
    return found


def allocated(items: Sequence[Item], bits: float, mixed: str, allowed: Sequence[float]) -> Allocation:
    """The best allocation for a size, of the widths that are worth looking at.

    Args:
        items: The linears, measured at all widths.
        bits: Budget in stored bits per weight.
        mixed: One of :data:`MODES`.
        allowed: The widths that a linear may have.

    Raises:
        ValueError: If the mode is unknown or the size cannot be met.
    """
    if mixed not in MODES:
        raise ValueError(f"mixed must be one of {', '.join(MODES)}, got {mixed!r}")
    candidates = candidate_widths(measured_sizes(items), bits, allowed)
    some = [replace(i, bits={k: i.bits[k] for k in candidates}, loss={k: i.loss[k] for k in candidates}) for i in items]
    return least_loss(some, bits, mixed)


def opened_runner(model: str | Path, calibration: str | Path | None, trust_remote_code: bool, clock: Clock) -> Runner:
    """A checkpoint ready to be run, nothing of its weights read; warns of what it leaves unquantized.

    Raises:
        ValueError: If the checkpoint or the calibration text is not fit for this.
    """
    from ..lm import dense_ops  # needs mlx-lm

    dense_ops.install()  # attention over the calibration text
    clock.tick(f"reading {model}")
    source = Source(Path(model))
    tokens = texts.calibration_tokens(source.path, calibration, trust_remote_code)
    layered = LayeredModel(source, tokens, BATCH)
    for path in layered.paths:
        for linear in layered.names.made(path):
            warnings.warn(f"{path}.{linear} is not quantized: the checkpoint has no tensor of that name", stacklevel=3)
    return Runner(source, tokens, layered, clock)


def teller(clock: Clock) -> Callable[[str], None]:
    """What tells of damaged and foreign files: the log and the progress."""

    def tell(message: str) -> None:
        _log.warning(message)
        clock.tell(message)

    return tell


def measured_items(state: JobState) -> list[list[Item]] | None:
    """The linears of each layer, losses as KL divergence of the model's output; ``None`` unless all is measured.

    Each part must have been made from the hidden states behind the one before.
    """
    scales = state.read_json(_SENSITIVITY)
    if scales is None:
        return None
    found, at = [], None
    for index, scale in enumerate(scales):
        part = part_of(index)
        seal = state.seal(part)
        if seal is None or at not in (None, seal.made_from.get("before")):
            return None
        items, _ = items_from(state.read_json(part))
        divergence = max(0.0, float.fromhex(scale))  # rounding can leave one that is nearly zero below
        scaled = [replace(i, loss={k: divergence * v for k, v in i.loss.items()}) for i in items]
        found.append(expected_elsewhere(scaled))
        at = seal.after
    return found if state.seal(_SENSITIVITY, {"before": at or ""}) is not None else None


def part_of(index: int) -> str:
    """Name of a layer's part."""
    return f"measured-{index:04}.json"


class Measurement:
    """The measurement of a model.

    Args:
        state: Its directory.
        runner: The model.
        codebook: One of :data:`codec.CODEBOOKS`.
        seed: Seed of everything random.
    """

    def __init__(self, state: JobState, runner: Runner, codebook: str, seed: int):
        self.state, self.runner, self.codebook, self.seed = state, runner, codebook, seed
        self.widths = all_widths(codebook)

    def items(self) -> list[list[Item]]:
        """The linears of each layer; see :func:`measured_items`. What is missing is measured."""
        found = measured_items(self.state)
        if found is None:
            self._measure()
            found = measured_items(self.state)
            assert found is not None  # it was written just now
        else:
            self.runner.clock.skip(float(self.runner.count))
        for states in self.state.directory.glob("measured-state-*"):  # of no more use
            states.unlink()
        return found

    def _measure(self) -> None:
        runner, count = self.runner, self.runner.count
        runner.directory = self.state.directory
        runner.reopen()
        finished = runner.finished("measured")
        work = Pass("measured", "json", count, runner.embeddings, self._layer, lambda i: {}, finished)
        states, at = follow(self.state, work)
        if self.state.seal(_SENSITIVITY, {"before": at}) is None:
            batches = len(runner.model.batches)
            energies = [items_from(self.state.read_json(part_of(i)))[1] for i in range(count)]
            found = sensitivities(runner.model, states[0], states[batches:], energies)
            self.state.write_json(_SENSITIVITY, [v.hex() for v in found], {"before": at})

    def _layer(self, index: int, states: States, known: bool) -> tuple[States, object]:
        """Behind the hidden states of the batches come the streams: those of the first windows, each disturbed after
        another layer.
        """
        runner, batches = self.runner, len(self.runner.model.batches)
        hidden, streams = states[:batches], states[batches:]
        found: list[Item] = []
        runner.load(index)
        with runner.taps(index) as taps:
            after = runner.run(index, hidden, taps=None if known else taps)
            if not known:
                original = Original(runner.model, index, hidden[0], after[0], self.seed)
                jobs = layer_jobs(runner.model, index, taps, original)
                found = runner.parallel(self._job, jobs, f"measuring {runner.of(index)}", 1.0, job_bytes)
                del jobs
            stream, energy = disturbed(hidden[0], after[0], [self.seed, index])
            runner.run(index, streams, 1.0, into=after, batch=0)
            after.append(stream)
        runner.unload(index)
        return after, items_value(found, energy)

    def _job(self, job: Job, threads: int) -> Item:
        prepared = prepare(job.weight(), job.hessian(), seed_of(self.seed, job.name))
        effect = job.effect()
        loss = {k: effect * expected_loss(prepared, k, self.codebook) for k in self.widths}
        size = {k: stored_bits(job.shape, k, self.codebook, job.bias is not None) for k in self.widths}
        return Item(job.name, job.group, job.shape[0] * job.shape[1], size, loss)
