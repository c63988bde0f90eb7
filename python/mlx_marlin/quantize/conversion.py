"""Convert a checkpoint to EXL3: measure, allocate, quantize layer by layer, assemble.

Every step leaves its result in ``<output>/.convert``, written beside and renamed; a later run continues there. The
directory is removed when the model is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from .. import codec, kernels
from ..loader.exl3 import MARKERS
from ..loader.scaling import up_divisor
from ..storage import atomic
from ..storage.safetensors import Tensor, write_tensors
from .allocate import Allocation, Item, allocate
from .calibration import calibration_tokens
from .embedding import write_embedding
from .head import head_tensors
from .jobs import Job, layer_jobs, seed_of, wanted
from .layered import LayeredModel, Taps
from .progress import Clock, Progress
from .sensitivity import disturbed, sensitivities
from .settings import Settings, check_settings
from .source import Source
from .weight import Codes, expected_loss, prepare, quantize_prepared
from .writer import FINISHED, assemble, stored_tensors

# Candidate widths reach this far below and above the budget.
_BELOW, _ABOVE = 2, 3
# 65536 tokens: of 128 experts, 8 per token, each sees 4096 on average, twice as many as it has inputs of 2048.
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 256, 256
_EXPERT_UP = re.compile(r"\.experts\.\d+\.(?:up_proj|w3)$")
_BATCH = 8  # windows per call of a layer

Result = TypeVar("Result")


def stored_bits(shape: tuple[int, int], k: float, codebook: str, bias: bool) -> int:
    """Everything that EXL3 stores for a linear, in bits: codes, scales, marker, bias."""
    rows, columns = (-(-n // codec.HADAMARD_SIZE) * codec.HADAMARD_SIZE for n in shape)
    marker = 32 if codebook in MARKERS else 0
    return rows * columns * codec.half_bits(k) // 2 + 16 * (rows + columns) + marker + (16 * columns if bias else 0)


def convert(
    model: str | Path,
    output: str | Path,
    *,
    bits: float,
    head_bits: float = 6,
    embed_bits: int | None = None,
    codebook: str = "mul1",
    half_rates: bool = True,
    calibration: str | Path | None = None,
    mixed: str = "per-expert",
    resume: bool = False,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Allocation:
    """Quantize a checkpoint that mlx-lm can run into an EXL3 directory.

    Args:
        model: Directory of an unquantized Hugging Face checkpoint, fp16, bf16 or fp32.
        output: Directory to be made.
        bits: Stored bits per weight of the quantized layers: codes, suh, svh and biases, without the head.
        head_bits: K of the output projection; 16 leaves it in half precision. Default: ``6``.
        embed_bits: K of the token embedding, 1 to 8, which ExLlamaV3 reads since 1.6.0. Default: ``None``, unquantized.
        codebook: ``"mul1"``, ``"mcg"`` or ``"3inst"``. Default: ``"mul1"``.
        half_rates: Whether linears may have 1.5, 2.5 and 3.5 bits, which exist for mul1 only and which ExLlamaV3 reads
            since 1.5.1; older versions take them for the whole width below. Default: ``True``.
        calibration: Text file; the bundled text if ``None``. Default: ``None``.
        mixed: ``"per-expert"`` lets every expert and projection have its own K; ``"per-layer"`` one K per
            projection over the experts of a layer, which other EXL3 loaders need; ``"uniform"`` the same with two
            neighbouring whole widths and what lies between them only. Default: ``"per-expert"``.
        resume: Continue an interrupted conversion in ``output``. Default: ``False``.
        seed: Seed of the random signs. The result depends on nothing else than the arguments. Default: ``0``.
        progress: Called with a :class:`Progress` after each finished piece of work.

    Returns:
        Allocation: the widths, the stored bits per weight, the loss and its proven bound.

    Raises:
        ValueError: If an argument or the checkpoint is not fit for this.
        FileExistsError: If ``output`` holds files and ``resume`` is not set.
        OSError: If a file cannot be read or written; what is done stays for ``resume``.
    """
    from threadpoolctl import threadpool_limits

    settings = check_settings(bits, head_bits, embed_bits, codebook, half_rates, mixed, seed)
    source, target = Source(Path(model)), Path(output)
    tokens = calibration_tokens(source.path, calibration, CALIBRATION_WINDOWS, CALIBRATION_LENGTH)
    work = _open_work(target, source, settings, tokens, resume)
    with threadpool_limits(1, "blas"):  # sums must not depend on the machine's cores; experts run side by side
        return _Conversion(source, target, work, settings, tokens, progress).run()


def _open_work(output: Path, source: Source, settings: Settings, tokens: np.ndarray, resume: bool) -> Path:
    """The work directory; checks that an interrupted conversion was the same one."""
    job = {**vars(settings), "source": source.fingerprint(), "tokens": hashlib.sha256(tokens.tobytes()).hexdigest()}
    work = output / ".convert"
    if (output / FINISHED).exists():
        shutil.rmtree(output / FINISHED)
    if output.exists() and any(output.iterdir()):
        if not resume:
            raise FileExistsError(f"{output} is not empty; choose another directory, or resume what was begun there")
        if not (work / "job.json").is_file():
            done = "a finished model" if (output / "config.json").is_file() else "other files"
            raise FileExistsError(f"{output} holds {done}, not an interrupted conversion; choose another directory")
        begun = json.loads((work / "job.json").read_text())
        changed = sorted(key for key in job if begun.get(key) != job[key])
        if changed:
            raise ValueError(
                f"the conversion in {output} was begun with other settings ({', '.join(changed)}); "
                "resume with the same ones or choose another directory"
            )
    for directory in (output, work):
        atomic.remove_leftovers(directory)
    atomic.write_text(work / "job.json", json.dumps(job))
    return work


class _Conversion:
    """One conversion, from the first measurement to the last file."""

    def __init__(
        self,
        source: Source,
        output: Path,
        work: Path,
        settings: Settings,
        tokens: np.ndarray,
        report: Callable[[Progress], None] | None,
    ):
        self.source, self.output, self.work, self.settings = source, output, work, settings
        self.model = LayeredModel(source.path, tokens, _BATCH)
        self.tokens = tokens
        low = max(1, int(settings.bits) - _BELOW)
        high = min(codec.MAX_BITS, int(np.ceil(settings.bits)) + _ABOVE)
        self.candidates = tuple(k for k in settings.widths if low <= k <= high)
        self.workers = kernels.cpu_threads()
        self.clock = Clock(2.0 * len(self.model.layers) + 1.0, report)  # in layers: measured, quantized; the head

    def run(self) -> Allocation:
        items = self._measure()
        allocation = allocate(items, self.settings.bits, self.settings.mixed)
        atomic.write_text(self.work / "plan.txt", plan_table(items, allocation))
        self.model = LayeredModel(self.source.path, self.tokens, _BATCH)  # the first run let go of the weights
        hidden = self._quantize(allocation)
        self._head(hidden)
        if self.settings.embed_bits is not None:
            bits, seed = self.settings.embed_bits, self.settings.seed
            write_embedding(self.work, self.model, self.source, bits, seed, self.workers)
        self.clock.advance("assembling", 1.0)
        assemble(
            self.source,
            self.output,
            self.work,
            len(self.model.layers),
            head_bits=self.settings.head_bits,
            codebook=self.settings.codebook,
            calibration=self.tokens.shape,
        )
        return allocation

    # Stage 1: the effect of every candidate width, along the original model.

    def _measure(self) -> list[Item]:
        count = len(self.model.layers)
        batches = len(self.model.batches)
        state, first = self._last_state("measured", count, self.model.embeddings)
        # Behind the hidden states of the batches come the streams: those of the first windows, each disturbed after
        # another layer.
        hidden, streams = state[:batches], state[batches:]
        items: list[list[Item]] = []
        energies: list[float] = []
        for index in range(first):
            found, energy = _load_items(self.work / f"measured-{index:04}.json")
            items.append(found)
            energies.append(energy)
        self.clock.skip(first)
        for index in range(first, count):
            self.model.load(index)
            with Taps(self.model.layers[index], wanted) as taps:
                taps.record(True)
                after = self.model.run(index, hidden)
                taps.record(False)
                jobs = layer_jobs(self.model, index, taps, self.source, hidden, self.settings.seed)
                found = self._parallel(self._measure_job, jobs)
                streams = [self.model.run(index, [s])[0] for s in streams]
            self.model.unload(index)
            stream, energy = disturbed(hidden[0], after[0], [self.settings.seed, index])
            streams.append(stream)
            energies.append(energy)
            hidden = after
            self._save_state("measured", index, hidden + streams)
            _save_items(self.work / f"measured-{index:04}.json", found, energy)
            items.append(found)
            self.clock.advance(f"measured layer {index + 1} of {count}", 1.0)
        return self._in_output_units(items, hidden[0], streams, energies)

    def _in_output_units(
        self, items: list[list[Item]], hidden: np.ndarray, streams: list[np.ndarray], energies: list[float]
    ) -> list[Item]:
        """Losses as KL divergence of the model's output."""
        target = self.work / "sensitivity.json"
        if not target.exists():
            found = sensitivities(self.model, hidden, streams, energies)
            atomic.write_text(target, json.dumps([v.hex() for v in found]))
        scales = [float.fromhex(v) for v in json.loads(target.read_text())]
        return [
            replace(item, loss={k: scale * v for k, v in item.loss.items()})
            for scale, layer in zip(scales, items)
            for item in layer
        ]

    def _measure_job(self, job: Job, threads: int) -> Item:
        s = self.settings
        prepared = prepare(job.weight(), job.hessian, seed_of(s.seed, job.name))
        loss = {k: job.effect * expected_loss(prepared, k, s.codebook) for k in self.candidates}
        size = {k: stored_bits(job.shape, k, s.codebook, job.bias is not None) for k in self.candidates}
        return Item(job.name, job.group, job.shape[0] * job.shape[1], size, loss)

    # Stage 2: quantize along the quantized model, so that later layers see the earlier layers' errors.

    def _quantize(self, allocation: Allocation) -> list[np.ndarray]:
        count = len(self.model.layers)
        hidden, first = self._last_state("layer", count, self.model.embeddings)
        self.clock.skip(first)
        for index in range(first, count):
            self.model.load(index)
            with Taps(self.model.layers[index], wanted) as taps:
                taps.record(True)
                self.model.run(index, hidden)
                taps.record(False)
                jobs = layer_jobs(self.model, index, taps, self.source, hidden, None)
                results = self._parallel(lambda job, n: self._quantize_job(job, allocation.widths[job.name], n), jobs)
                tensors: dict[str, Tensor] = {}
                for job, codes in zip(jobs, results):
                    divisor = up_divisor(self.source.config, index) if _EXPERT_UP.search(job.name) else 1
                    tensors.update(stored_tensors(job.name, codes, job.bias, divisor))
                    job.install(codec.dequantize(codes), None if job.bias is None else half_round(job.bias))
                hidden = self.model.run(index, hidden)
            self.model.unload(index)
            self._save_state("layer", index, hidden)
            write_tensors(self.work / f"layer-{index:04}.safetensors", tensors)
            self.clock.advance(f"quantized layer {index + 1} of {count}", 1.0)
        return hidden

    def _quantize_job(self, job: Job, bits: float, threads: int) -> Codes:
        prepared = prepare(job.weight(), job.hessian, seed_of(self.settings.seed, job.name))
        return quantize_prepared(prepared, bits, self.settings.codebook, threads)

    # Stage 3: the output projection.

    def _head(self, hidden: list[np.ndarray]) -> None:
        target = self.work / "head.safetensors"
        if not target.exists():
            tensors = head_tensors(
                self.model,
                self.source,
                hidden,
                bits=self.settings.head_bits,
                codebook=self.settings.codebook,
                seed=self.settings.seed,
                threads=self.workers,
            )
            write_tensors(target, tensors)

    def _parallel(self, task: Callable[[Job, int], Result], jobs: list[Job]) -> list[Result]:
        """Run a task for every job, the cores shared among them; results in the order of the jobs."""
        threads = max(1, self.workers // max(1, len(jobs)))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda job: task(job, threads), jobs))

    # The hidden states after the last finished layer of a stage. Written before the layer's own result, so that a
    # result always has its state; only the newest is kept.

    def _save_state(self, stage: str, index: int, hidden: list[np.ndarray]) -> None:
        with atomic.writing(self.work / f"{stage}-state-{index:04}.npz") as file:
            np.savez(file, *hidden)
        (self.work / f"{stage}-state-{index - 2:04}.npz").unlink(missing_ok=True)

    def _last_state(
        self, stage: str, count: int, start: Callable[[], list[np.ndarray]]
    ) -> tuple[list[np.ndarray], int]:
        suffix = {"measured": "json", "layer": "safetensors"}[stage]
        done = 0
        while done < count and (self.work / f"{stage}-{done:04}.{suffix}").exists():
            done += 1
        if not done:
            return start(), 0
        with np.load(self.work / f"{stage}-state-{done - 1:04}.npz") as state:
            return [state[f"arr_{i}"] for i in range(len(state.files))], done


def half_round(values: np.ndarray) -> np.ndarray:
    """What remains of values stored in half precision."""
    return values.astype(np.float16).astype(np.float32)


def _save_items(path: Path, items: list[Item], energy: float) -> None:
    rows = [
        [i.name, i.group, i.weights, list(i.bits.items()), [[k, v.hex()] for k, v in i.loss.items()]] for i in items
    ]
    atomic.write_text(path, json.dumps({"energy": energy.hex(), "items": rows}))


def _load_items(path: Path) -> tuple[list[Item], float]:
    stored = json.loads(path.read_text())
    items = [
        Item(name, group, weights, dict(bits), {k: float.fromhex(v) for k, v in loss})
        for name, group, weights, bits, loss in stored["items"]
    ]
    return items, float.fromhex(stored["energy"])


def plan_table(items: list[Item], allocation: Allocation) -> str:
    """The plan as a readable table: one line per linear."""
    gap = allocation.loss / allocation.bound - 1 if allocation.bound > 0 else 0.0
    lines = [
        f"bits per weight {allocation.bits:.4f}   loss {allocation.loss:.6g}   within {100 * gap:.3g} % of the bound",
        f"{'linear':60} {'weights':>10} {'K':>3} {'loss':>12} {'share of loss':>14}",
    ]
    for item in items:
        k = allocation.widths[item.name]
        share = item.loss[k] / allocation.loss if allocation.loss else 0.0
        lines.append(f"{item.name:60} {item.weights:10d} {k!s:>3} {item.loss[k]:12.4g} {100 * share:13.3f}%")
    return "\n".join(lines) + "\n"
