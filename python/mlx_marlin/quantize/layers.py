"""Quantize a model's layers along the quantized model, so that later layers see the earlier layers' errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import codec
from ..loader.scaling import up_divisor
from ..storage.safetensors import Tensor, read_header
from .allocation import Allocation
from .embedding import embedding_tensors
from .embedding import part_of as embedding_part
from .extras import Extras, write_extras
from .head import head_tensors
from .job_state import JobState, Pass, States, digest_of, follow
from .jobs import Job, layer_jobs, seed_of
from .runner import Runner
from .searched import searched
from .settings import Settings
from .stored import stored_codes, stored_tensors
from .weight import Codes, prepare, quantize_prepared

_EXPERT_UP = re.compile(r"\.experts\.\d+\.(?:up_proj|w3)$")
_HEAD = "head.safetensors"


class LayerQuantizer:
    """Makes the parts of one size.

    Args:
        runner: The model.
        work: The work directory.
        measured: Directory of the measurement, where parts are that other sizes can use.
        settings: Of the conversion.
        allocation: The widths.
        of: Of which of several sizes, in words, for the progress.
    """

    def __init__(
        self,
        runner: Runner,
        work: JobState,
        measured: JobState,
        settings: Settings,
        allocation: Allocation,
        of: str,
    ):
        self.runner, self.work, self.measured = runner, work, measured
        self.settings, self.widths, self.of = settings, allocation.widths, of
        self.hidden: States = []
        self.at = ""

    def layers(self, names: Sequence[Sequence[str]]) -> list[Path]:
        """Quantize all layers.

        Args:
            names: Of the linears of each.

        Returns:
            The files.
        """

        def widths(index: int) -> dict[str, str]:
            return {"widths": digest_of({name: self.widths[name] for name in names[index]})}

        self.runner.reopen()
        start, finished = self.runner.model.embeddings, self.runner.finished("quantized", self.of)
        steps = Pass("layer", "safetensors", len(names), start, self._layer, widths, finished)
        self.hidden, self.at = follow(self.work, steps)
        return [self.work.directory / steps.part(i) for i in range(len(names))]

    def _layer(self, index: int, hidden: States, known: bool) -> tuple[States, dict[str, Tensor]]:
        runner = self.runner
        runner.load(index)
        with runner.taps(index) as taps:
            taps.record(True)
            runner.run(index, hidden)
            taps.record(False)
            jobs = layer_jobs(runner.model, index, taps, hidden, None)
            divisors = [up_divisor(runner.source.config, index) if _EXPERT_UP.search(job.name) else 1 for job in jobs]
            if known:
                stored = read_header(self.work.directory / f"layer-{index:04}.safetensors")
                results = [
                    stored_codes(job.name, stored, self.settings.codebook, job.shape, divisor)
                    for job, divisor in zip(jobs, divisors)
                ]
            else:
                results = self._codes(index, jobs, hidden)
            tensors: dict[str, Tensor] = {}
            for job, codes, divisor in zip(jobs, results, divisors):
                tensors.update(stored_tensors(job.name, codes, job.bias, divisor))
                job.install(codec.dequantize(codes), None if job.bias is None else half_round(job.bias))
            hidden = runner.model.run(index, hidden)
        runner.unload(index)
        return hidden, tensors

    def _codes(self, index: int, jobs: list[Job], hidden: States) -> list[Codes]:
        def search(some: list[Job]) -> list[Codes]:
            return self.runner.parallel(self._job, some, f"quantizing {self.runner.of(index)}{self.of}", 1.0)

        if index:
            return search(jobs)
        return searched(self.measured, jobs, self.widths, self.settings.codebook, hidden, search)

    def _job(self, job: Job, threads: int) -> Codes:
        prepared = prepare(job.weight(), job.hessian(), seed_of(self.settings.seed, job.name))
        return quantize_prepared(prepared, self.widths[job.name], self.settings.codebook, threads)

    def head(self, name: str) -> Path:
        """Quantize the output projection of this name, after the layers."""
        if self.work.seal(_HEAD, {"before": self.at}) is None:
            self.runner.clock.tick(f"quantizing the head{self.of}")
            tensors = head_tensors(
                self.runner.model,
                name,
                self.hidden,
                bits=self.settings.head_bits,
                codebook=self.settings.codebook,
                seed=self.settings.seed,
                threads=self.runner.workers,
            )
            self.work.write_tensors(_HEAD, tensors, {"before": self.at})
        return self.work.directory / _HEAD

    def others(self, extras: Extras) -> list[Path]:
        """Quantize what no calibration sees: the token embedding if asked, prediction layers and towers."""
        files, bits = list(extras.files), self.settings.embed_bits
        if bits is not None:
            files.append(embedding_part(bits))
            if self.measured.seal(embedding_part(bits)) is None:
                runner = self.runner
                tensors = embedding_tensors(runner.model, runner.source, bits, self.settings.seed, runner.workers)
                self.measured.write_tensors(embedding_part(bits), tensors)
        write_extras(self.measured, extras, self.runner.source, self.settings, self.runner.parallel)
        return [self.measured.directory / name for name in files]


def half_round(values: np.ndarray) -> np.ndarray:
    """What remains of values stored in half precision."""
    return values.astype(np.float16).astype(np.float32)
