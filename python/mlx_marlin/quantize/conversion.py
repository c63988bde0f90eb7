"""Convert a checkpoint to EXL3: measure, allocate, quantize layer by layer, assemble.

Every step leaves its result in ``<output>/.convert``, sealed; a later run continues there. The directory is removed
when the model is complete.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from .. import codec, kernels
from ..loader.scaling import up_divisor
from ..storage import atomic
from ..storage.safetensors import Tensor, read_header
from .allocate import Allocation, Item, allocate
from .budget import candidate_widths, stored_bits
from .calibration import calibration_tokens
from .embedding import PART as EMBEDDING
from .embedding import embedding_tensors
from .extras import Extras, find_extras, write_extras
from .head import head_name, head_tensors
from .job_state import JobState, Pass, States, digest_of, follow
from .jobs import Job, layer_jobs, seed_of
from .layered import LayeredModel
from .plan import items_from, items_value, plan_table
from .progress import Clock, Progress
from .resume import opened
from .sensitivity import disturbed, sensitivities
from .settings import Settings, check_settings
from .source import Source
from .stored import stored_codes, stored_tensors
from .taps import Taps
from .weight import Codes, expected_loss, prepare, quantize_prepared
from .writer import HEAD, assemble

# 65536 tokens: of 128 experts, 8 per token, each sees 4096 on average, twice as many as it has inputs of 2048.
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 256, 256
_EXPERT_UP = re.compile(r"\.experts\.\d+\.(?:up_proj|w3)$")
_BATCH = 8  # windows per call of a layer

Task = TypeVar("Task")
Result = TypeVar("Result")
_log = logging.getLogger("mlx_marlin.quantize")


def convert(
    model: str | Path,
    output: str | Path,
    *,
    bits: float,
    head_bits: float = 6,
    embed_bits: int | None = None,
    mtp_bits: float = 4,
    vision_bits: int = 6,
    codebook: str = "mul1",
    half_rates: bool = True,
    calibration: str | Path | None = None,
    mixed: str = "per-expert",
    resume: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Allocation:
    """Quantize a checkpoint that mlx-lm can run into an EXL3 directory.

    Args:
        model: Directory of a Hugging Face checkpoint, fp16, bf16 or fp32, or fp8 in blocks or mxfp4, in the names of
            the original or of mlx-lm.
        output: Directory to be made.
        bits: Stored bits per weight of the quantized layers: codes, suh, svh and biases, without the head.
        head_bits: K of the output projection; 16 leaves it in half precision. Default: ``6``.
        embed_bits: K of the token embedding, 1 to 8, which ExLlamaV3 reads since 1.6.0. Default: ``None``, unquantized.
        mtp_bits: K of the linears of multi-token prediction layers, quantized without calibration; 16 keeps the layers
            as they are, 0 leaves them out. Default: ``4``.
        vision_bits: The same of vision towers, in whole bits. Towers other than Qwen3-VL's and Qwen3.5's are kept as
            they are unless this is 0. Default: ``6``.
        codebook: ``"mul1"``, ``"mcg"`` or ``"3inst"``. Default: ``"mul1"``.
        half_rates: Whether linears may have 1.5, 2.5 and 3.5 bits, which exist for mul1 only and which ExLlamaV3 reads
            since 1.5.1; older versions take them for the whole width below. Default: ``True``.
        calibration: Text file; the bundled text if ``None``. Default: ``None``.
        mixed: ``"per-expert"`` lets every expert and projection have its own K; ``"per-layer"`` one K per
            projection over the experts of a layer, which other EXL3 loaders need; ``"uniform"`` the same with two
            neighbouring whole widths and what lies between them only. Default: ``"per-expert"``.
        resume: Continue an interrupted conversion in ``output``, of the same checkpoint by content, wherever that lies
            now. Files of it that are damaged or foreign are told, and made again. Default: ``False``.
        seed: Seed of the random signs. The result depends on nothing else than the arguments. Default: ``0``.
        trust_remote_code: Whether a tokenizer may run code from the checkpoint. Default: ``False``.
        progress: Called with a :class:`Progress` after each finished piece of work.

    Returns:
        Allocation: the widths, the stored bits per weight, the loss and its proven bound.

    Raises:
        ValueError: If an argument or the checkpoint is not fit for this, what is to be resumed was begun with something
            else, or another conversion writes to ``output``.
        FileExistsError: If ``output`` holds files and ``resume`` is not set.
        OSError: If a file cannot be read or written; what is done stays for ``resume``.
    """
    from threadpoolctl import threadpool_limits

    settings = check_settings(
        Settings(
            bits=float(bits),
            head_bits=head_bits,
            embed_bits=embed_bits,
            mtp_bits=mtp_bits,
            vision_bits=vision_bits,
            codebook=codebook,
            half_rates=bool(half_rates),
            mixed=mixed,
            seed=int(seed),
        )
    )
    clock = Clock(progress)
    clock.tick(f"reading {model}")
    source, target = Source(Path(model)), Path(output)
    tokens = calibration_tokens(source.path, calibration, CALIBRATION_WINDOWS, CALIBRATION_LENGTH, trust_remote_code)
    asked = _check(source, target, settings, tokens)

    def tell(message: str) -> None:
        _log.warning(message)
        clock.tell(message)

    with (
        threadpool_limits(1, "blas"),  # sums must not depend on the machine's cores; experts run side by side
        opened(target, resume, source, settings, tokens, tell, clock.tick) as state,
    ):
        return _Conversion(source, target, state, settings, tokens, asked, clock).run()


@dataclass
class _Checked:
    """What is known before the work.

    Attributes:
        model: The model, nothing of it read.
        head: Name of the output projection.
        candidates: The widths to be measured.
        extras: What is done with prediction layers and towers.
    """

    model: LayeredModel
    head: str
    candidates: tuple[float, ...]
    extras: Extras


def _check(source: Source, output: Path, settings: Settings, tokens: np.ndarray) -> _Checked:
    """See that a conversion can be done, and warn of what it leaves unquantized.

    Raises:
        ValueError: If it cannot.
    """
    source.side_files(output)
    model = LayeredModel(source, tokens, _BATCH)
    for path in model.paths:
        for linear in model.names.made(path):
            warnings.warn(f"{path}.{linear} is not quantized: the checkpoint has no tensor of that name", stacklevel=3)
    return _Checked(
        model,
        head_name(model, source),
        candidate_widths(model, settings),
        find_extras(source, settings, len(model.layers)),
    )


class _Conversion:
    """One conversion, from the first measurement to the last file."""

    def __init__(
        self,
        source: Source,
        output: Path,
        state: JobState,
        settings: Settings,
        tokens: np.ndarray,
        checked: _Checked,
        clock: Clock,
    ):
        self.source, self.output, self.state, self.settings = source, output, state, settings
        self.work, self.tokens = state.directory, tokens
        self.model, self.head_name = checked.model, checked.head
        self.unloaded: set[int] = set()  # layers that the model let go of
        self.candidates, self.extras = checked.candidates, checked.extras
        self.workers = kernels.cpu_threads()
        self.clock = clock
        clock.total = 2.0 * len(self.model.layers) + 1.0  # in layers: measured, quantized; the head

    def _open_model(self) -> None:
        self.model = LayeredModel(self.source, self.tokens, _BATCH)
        self.unloaded.clear()

    def _load(self, index: int) -> None:
        if index in self.unloaded:
            self._open_model()
        self.model.load(index)

    def _unload(self, index: int) -> None:
        self.model.unload(index)
        self.unloaded.add(index)

    def run(self) -> Allocation:
        layers = self._measure()
        items = [item for layer in layers for item in layer]
        allocation = allocate(items, self.settings.bits, self.settings.mixed)
        atomic.write_text(self.work / "plan.txt", plan_table(items, allocation, self.extras.notes))
        self._open_model()  # the first run let go of the weights
        hidden, at = self._quantize(layers, allocation)
        self._head(hidden, at)
        self._embedding()
        write_extras(self.state, self.extras, self.source, self.settings, self._parallel)
        self.clock.advance("assembling", 1.0)
        assemble(
            self.source,
            self.output,
            self.work,
            len(self.model.layers),
            head=self.head_name,
            replaced=self.model.names.stacked,
            extras=self.extras,
            settings=self.settings,
            calibration=self.tokens.shape,
        )
        return allocation

    # Stage 1: the effect of every candidate width, along the original model.

    def _measure(self) -> list[list[Item]]:
        """The linears of each layer."""
        count = len(self.model.layers)
        work = Pass(
            "measured", "json", count, self.model.embeddings, self._measure_layer, lambda i: {}, self._done("measured")
        )
        states, at = follow(self.state, work)
        batches = len(self.model.batches)
        measured = [items_from(self.state.read_json(work.part(i))) for i in range(count)]
        energies = [energy for _, energy in measured]
        scales = self.state.read_json("sensitivity.json", {"before": at})
        if scales is None:
            found = sensitivities(self.model, states[0], states[batches:], energies)
            scales = [v.hex() for v in found]
            self.state.write_json("sensitivity.json", scales, {"before": at})
        # Losses as KL divergence of the model's output.
        return [
            [replace(item, loss={k: float.fromhex(scale) * v for k, v in item.loss.items()}) for item in layer]
            for scale, (layer, _) in zip(scales, measured)
        ]

    def _measure_layer(self, index: int, states: States, known: bool) -> tuple[States, object]:
        """Behind the hidden states of the batches come the streams: those of the first windows, each disturbed after
        another layer.
        """
        batches = len(self.model.batches)
        hidden, streams = states[:batches], states[batches:]
        found: list[Item] = []
        self._load(index)
        with self._taps(index) as taps:
            taps.record(not known)
            after = self._run(index, hidden)
            taps.record(False)
            if not known:
                # Of no more use to the caller either; they are half a GB at 65536 tokens and 2048 channels.
                states.clear()
                del hidden[1:]
                jobs = layer_jobs(self.model, index, taps, hidden, self.settings.seed)
                found = self._parallel(self._measure_job, jobs, f"measuring {self._of(index)}", 1.0)
                del jobs
            streams = [self.model.run(index, [s])[0] for s in streams]
        self._unload(index)
        stream, energy = disturbed(hidden[0], after[0], [self.settings.seed, index])
        return [*after, *streams, stream], items_value(found, energy)

    def _run(self, index: int, hidden: States) -> States:
        """The layer's output for the calibration's windows."""
        stage = f"calibrating {self._of(index)}"
        return self.model.run(index, hidden, lambda n: self.clock.tick(f"{stage}: {n} of {len(hidden)} batches"))

    def _of(self, index: int) -> str:
        return f"layer {index + 1} of {len(self.model.layers)}"

    def _done(self, verb: str) -> Callable[[int, int, bool], None]:
        def report(first: int, last: int, made: bool) -> None:
            if made:
                self.clock.advance(f"{verb} {self._of(last - 1)}", last - first)
            else:
                self.clock.skip(last - first)

        return report

    def _measure_job(self, job: Job, threads: int) -> Item:
        s = self.settings
        prepared = prepare(job.weight(), job.hessian(), seed_of(s.seed, job.name))
        loss = {k: job.effect * expected_loss(prepared, k, s.codebook) for k in self.candidates}
        size = {k: stored_bits(job.shape, k, s.codebook, job.bias is not None) for k in self.candidates}
        return Item(job.name, job.group, job.shape[0] * job.shape[1], size, loss)

    # Stage 2: quantize along the quantized model, so that later layers see the earlier layers' errors.

    def _quantize(self, layers: list[list[Item]], allocation: Allocation) -> tuple[States, str]:
        def widths(index: int) -> dict[str, str]:
            return {"widths": digest_of({item.name: allocation.widths[item.name] for item in layers[index]})}

        def layer(index: int, hidden: States, known: bool) -> tuple[States, dict[str, Tensor]]:
            return self._quantize_layer(index, hidden, known, allocation)

        work = Pass("layer", "safetensors", len(layers), self.model.embeddings, layer, widths, self._done("quantized"))
        return follow(self.state, work)

    def _quantize_layer(
        self, index: int, hidden: States, known: bool, allocation: Allocation
    ) -> tuple[States, dict[str, Tensor]]:
        self._load(index)
        with self._taps(index) as taps:
            taps.record(True)
            self._run(index, hidden)
            taps.record(False)
            jobs = layer_jobs(self.model, index, taps, hidden, None)
            divisors = [up_divisor(self.source.config, index) if _EXPERT_UP.search(job.name) else 1 for job in jobs]
            if known:
                stored = read_header(self.work / f"layer-{index:04}.safetensors")
                results = [
                    stored_codes(job.name, stored, self.settings.codebook, job.shape, divisor)
                    for job, divisor in zip(jobs, divisors)
                ]
            else:
                results = self._parallel(
                    lambda job, n: self._quantize_job(job, allocation.widths[job.name], n),
                    jobs,
                    f"quantizing {self._of(index)}",
                    1.0,
                )
            tensors: dict[str, Tensor] = {}
            for job, codes, divisor in zip(jobs, results, divisors):
                tensors.update(stored_tensors(job.name, codes, job.bias, divisor))
                job.install(codec.dequantize(codes), None if job.bias is None else half_round(job.bias))
            hidden = self.model.run(index, hidden)
        self._unload(index)
        return hidden, tensors

    def _quantize_job(self, job: Job, bits: float, threads: int) -> Codes:
        prepared = prepare(job.weight(), job.hessian(), seed_of(self.settings.seed, job.name))
        return quantize_prepared(prepared, bits, self.settings.codebook, threads)

    # Stage 3: the output projection, and what the tokens go in through.

    def _head(self, hidden: States, at: str) -> None:
        if self.state.seal(HEAD, {"before": at}) is None:
            self.clock.tick("quantizing the head")
            tensors = head_tensors(
                self.model,
                self.head_name,
                hidden,
                bits=self.settings.head_bits,
                codebook=self.settings.codebook,
                seed=self.settings.seed,
                threads=self.workers,
            )
            self.state.write_tensors(HEAD, tensors, {"before": at})

    def _embedding(self) -> None:
        bits = self.settings.embed_bits
        if bits is not None and self.state.seal(EMBEDDING) is None:
            tensors = embedding_tensors(self.model, self.source, bits, self.settings.seed, self.workers)
            self.state.write_tensors(EMBEDDING, tensors)

    def _taps(self, index: int) -> Taps:
        path, names = self.model.paths[index], self.model.names
        return Taps(self.model.layers[index], names.linears(path), names.experts(path))

    def _parallel(
        self, task: Callable[[Task, int], Result], jobs: list[Task], stage: str, work: float = 0.0
    ) -> list[Result]:
        """Run a task for every job, the cores shared among them; results in the order of the jobs.

        Args:
            task: Given a job and its number of threads.
            jobs: The jobs.
            stage: What they are, for the progress.
            work: What they are together of the clock's total. Default: ``0.0``, not counted.
        """
        threads = max(1, self.workers // max(1, len(jobs)))
        results: list[Result] = []
        with ThreadPoolExecutor(self.workers) as pool:
            for result in pool.map(lambda job: task(job, threads), jobs):
                results.append(result)
                self.clock.tick(f"{stage}: {len(results)} of {len(jobs)} linears", work * len(results) / len(jobs))
        return results


def half_round(values: np.ndarray) -> np.ndarray:
    """What remains of values stored in half precision."""
    return values.astype(np.float16).astype(np.float32)
