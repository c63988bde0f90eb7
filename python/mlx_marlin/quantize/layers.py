"""Quantize a model's layers along the quantized model, so that later layers see the earlier layers' errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import codec
from ..loader.scaling import up_divisor
from ..storage.safetensors import Tensor, TensorInfo, read_header
from .allocation import Allocation
from .embedding import embedding_tensors
from .embedding import part_of as embedding_part
from .extras import Extras, write_extras
from .head import head_tensors
from .job_state import JobState, Pass, digest_of, follow
from .jobs import Job, job_bytes, layer_jobs, seed_of
from .runner import Runner
from .searched import searched
from .settings import Settings
from .spill import Spill, States, StoredTensor
from .stored import stored_codes, stored_tensors
from .weight import prepare, quantize_prepared

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
        runner.directory = work.directory
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
        start, finished = self.runner.embeddings, self.runner.finished("quantized", self.of)
        steps = Pass("layer", "safetensors", len(names), start, self._layer, widths, finished)
        self.hidden, self.at = follow(self.work, steps)
        return [self.work.directory / steps.part(i) for i in range(len(names))]

    def _layer(self, index: int, hidden: States, known: bool) -> tuple[States, Mapping[str, Tensor | StoredTensor]]:
        runner = self.runner
        runner.load(index)
        with runner.taps(index) as taps:
            runner.run(index, hidden, taps=taps)
            jobs = layer_jobs(runner.model, index, taps)
            divisors = {job.name: self._divisor(index, job) for job in jobs}
            stored: Mapping[str, TensorInfo | StoredTensor]
            if known:
                stored = read_header(self.work.directory / f"layer-{index:04}.safetensors")
            else:
                stored = tensors = self._tensors(index, jobs, divisors, hidden)
            for job in jobs:
                codes = stored_codes(job.name, stored, self.settings.codebook, job.shape, divisors[job.name])
                job.install(codec.dequantize(codes), None if job.bias is None else half_round(job.bias))
            after = runner.run(index, hidden, 1.0)
        runner.unload(index)
        return after, {} if known else tensors

    def _divisor(self, index: int, job: Job) -> int:
        return up_divisor(self.runner.source.config, index) if _EXPERT_UP.search(job.name) else 1

    def _tensors(
        self, index: int, jobs: list[Job], divisors: Mapping[str, int], hidden: States
    ) -> dict[str, StoredTensor]:
        """What is stored of a layer's linears, on the disk: a layer of many experts does not fit into memory."""
        spill = Spill(self.work.directory)

        def task(job: Job, threads: int) -> dict[str, StoredTensor]:
            prepared = prepare(job.weight(), job.hessian(), seed_of(self.settings.seed, job.name))
            codes = quantize_prepared(prepared, self.widths[job.name], self.settings.codebook, threads)
            made = stored_tensors(job.name, codes, job.bias, divisors[job.name])
            return {name: spill.tensor(tensor) for name, tensor in made.items()}

        def search(some: list[Job]) -> dict[str, StoredTensor]:
            stage = f"quantizing {self.runner.of(index)}{self.of}"
            found = self.runner.parallel(task, some, stage, 1.0, job_bytes)
            return {name: tensor for part in found for name, tensor in part.items()}

        return search(jobs) if index else searched(self.measured, jobs, self.widths, hidden, search)

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
