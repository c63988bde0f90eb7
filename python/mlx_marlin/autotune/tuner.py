"""The autotuner: times configs on this machine, keeps the table, answers from it, adapts to run-time timings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import device as machine
from .. import kernels, profile
from ..device.fingerprint import canonical_name, device_family
from ..kernels import KernelConfig, Problem
from ..measure.race import NO_LIMITS, Limits, OnRound, RaceSettings
from ..profile import files as profile_files
from ..profile import json as profile_json
from ..profile import lookup
from ..profile.active import use_profile
from ..profile.lookup import distinct_widths
from ..profile.schema import AutotuneConfig, Entry, ProfileError
from . import answers, feedback
from .trial import Objective, Trial, Verdicts
from .workload import Layer, Workload, as_layer, release

__all__ = ["AutotuneConfig", "BenchmarkResult", "KernelConfig", "MixedBPWAutoTuner", "Objective", "use_profile"]

_log = logging.getLogger("mlx_marlin")


@dataclass
class BenchmarkResult:
    """One timed config.

    Attributes:
        config: The config.
        latency_ms: Median over the iterations, in milliseconds per call.
        throughput_gbps: Bytes of weights, inputs and outputs that a call touches, over the latency, in 1e9 bytes/s.
        memory_footprint_mb: The layer's weights and MLX's peak memory during a call, in 1e6 bytes.
        timestamp: Seconds since the epoch.
    """

    config: KernelConfig
    latency_ms: float
    throughput_gbps: float
    memory_footprint_mb: float
    timestamp: float


class MixedBPWAutoTuner:
    """Times kernel configs on this machine and keeps the fastest ones, by problem.

    Args:
        device_name: Such as "M4 Max", with or without "Apple ": whose table :meth:`select_kernel` answers from.
            Default: ``None``, this machine's.
        config_path: A profile that is loaded if it exists, and the default target of :meth:`export_config`.
            Default: ``None``, the tuned profile of this machine if there is one, and no default target.
        device: ``"cpu"`` or ``"gpu"``. Default: ``None``, MLX's default device.
        objective: An :class:`Objective`, or a dictionary of its weights. Default: ``None``, latency only.
        memory_limit: Bytes that weights, their copies, inputs and a call may take. Default: ``None``, half of what
            the device can use.
        dtype: Of the activations in benchmarks. Default: ``None``, float32 on the CPU, float16 on the GPU.
        race: When a challenger beats the default. Default: ``None``, :class:`~.race.RaceSettings`.

    Attributes:
        config: The profile. What is benchmarked enters a profile of this machine: a table of another machine or build
            answers look-ups until then, and after what was measured here from then on.
        checked: Verdicts of the comparisons with the codec.
    """

    def __init__(
        self,
        device_name: str | None = None,
        config_path: str | Path | None = None,
        *,
        device: str | None = None,
        objective: Objective | Mapping[str, float] | None = None,
        memory_limit: int | None = None,
        dtype: str | None = None,
        race: RaceSettings | None = None,
    ):
        self._device = machine.check_device(device or machine.default_device())
        self._here = machine.device_name(self._device)
        self.device_name = canonical_name(device_name) if device_name else self._here
        self.device_family = device_family(self.device_name)
        self.objective = Objective.of(objective)
        self.memory_limit = machine.memory_bytes(self._device) // 2 if memory_limit is None else int(memory_limit)
        self.dtype = dtype or kernels.USUAL_DTYPE[self._device]
        self.race = race or RaceSettings()
        self.config_path = Path(config_path) if config_path is not None else None
        self.config = self._initial_config()
        self.checked: Verdicts = {}
        self._foreign: AutotuneConfig | None = None
        self._adaptation: feedback.Recorder[tuple[str, KernelConfig | None], KernelConfig] = feedback.Recorder()

    def _initial_config(self) -> AutotuneConfig:
        if self.config_path is not None and self.config_path.exists():
            return profile_files.load(self.config_path)
        if self.device_name != self._here:
            return AutotuneConfig(self.device_name, self.device_family)
        found = profile.tuned(self._device) if self.config_path is None else None
        return found or AutotuneConfig.of_machine(self._device)

    # Benchmarks

    def benchmark_layer(
        self,
        layer: Layer | Problem,
        batch_size: int,
        configs: Sequence[KernelConfig] | None = None,
        num_warmup: int = 5,
        num_iter: int = 20,
        *,
        top_k: int = 8,
        limits: Limits = NO_LIMITS,
        on_round: OnRound | None = None,
    ) -> list[BenchmarkResult]:
        """Time configs on a layer and enter the outcome into the table.

        Args:
            layer: TrellisLinear, TrellisSwitchGLU or -MLP, TrellisWeight, or a :class:`Problem`, which is given random
                weights.
            batch_size: Rows, at least 1.
            configs: What to time; the default config is always timed too. Default: ``None``, all candidates.
            num_warmup: Calls before the first sample.
            num_iter: Samples per config; fewer for those that cannot win.
            top_k: Experts per token of a TrellisSwitchGLU or -MLP. Default: ``8``.
            limits: When to end early. Default: never.
            on_round: See :func:`~.race.race`.

        Returns:
            One result per config that ran right, in the order of the configs. The others are in the entry's
            ``rejected``, with their reasons. None at all if time ran out.

        Raises:
            ValueError: If the layer cannot be timed, or the default config gives a wrong result.
            MemoryError: If the layer exceeds the memory limit.
        """
        unknown = [config for config in configs or () if not isinstance(config, KernelConfig)]
        if unknown:
            raise ValueError(f"configs must be KernelConfigs, got {unknown[0]!r}")
        workload: Workload | None = None
        trial: Trial | None = None
        try:
            workload = self._workload(layer, batch_size, top_k)
            problem = workload.problem
            settings = replace(self.race, rounds=max(2, num_iter), warmup=num_warmup)
            expected = profile.prediction(problem)
            first = expected.first if expected else ()
            trial = Trial(workload, settings, self.objective, self.memory_limit, self.checked, first)
            wanted = kernels.candidates_on(problem, machine.hardware(self._device)) if configs is None else configs
            entry = trial.run(wanted, limits, on_round)
            touched = workload.bytes_touched
        finally:
            workload = trial = None
            release()
        if entry is None:
            return []
        self._enter(problem, entry)
        return [
            BenchmarkResult(
                m.config, m.timing.median_ms, touched / m.timing.median_ms / 1e6, m.memory_mb, entry.timestamp
            )
            for m in entry.timings
            if m.config in wanted
        ]

    def _enter(self, problem: Problem, entry: Entry) -> None:
        """Keep a result, in a profile of this machine."""
        if profile_files.foreign(self.config, self._device) is not None:
            self._foreign, mine = self.config, AutotuneConfig.of_machine(self._device)
            mine.adaptation_enabled = self._foreign.adaptation_enabled
            mine.adaptation_history_len = self._foreign.adaptation_history_len
            self.config = mine
        self.config.benchmark_count += len(entry.timings)
        self.config.add(problem, entry)

    def _workload(self, layer: Layer | Problem, batch_size: int, top_k: int) -> Workload:
        if isinstance(layer, Problem):
            if layer.device != self._device:
                raise ValueError(f"the tuner times on the {self._device}, but the problem is for the {layer.device}")
            problem = replace(layer, rows=batch_size)
            return Workload.synthetic(problem, memory_limit=self.memory_limit, seed=self.race.seed)
        return Workload.of_layer(
            layer,
            batch_size,
            top_k=top_k,
            dtype=self.dtype,
            device=self._device,
            memory_limit=self.memory_limit,
            seed=self.race.seed,
        )

    def benchmark_all(
        self,
        layers: Mapping[str, Layer | Problem] | Sequence[Layer | Problem],
        batch_sizes: Iterable[int],
        num_warmup: int = 5,
        num_iter: int = 20,
        verbose: bool = True,
        *,
        top_k: int = 8,
    ) -> dict[str, dict[int, list[BenchmarkResult]]]:
        """Benchmark all layers at all batch sizes.

        Args:
            layers: By name, or a list, which is named "layer_0", "layer_1", ...
            batch_sizes: Rows.
            num_warmup, num_iter, top_k: See :meth:`benchmark_layer`.
            verbose: Whether to show a progress bar on stderr, if it is a terminal and rich is installed.

        Returns:
            ``{name: {batch_size: results}}``; a layer that exceeds the memory limit, or whose default config fails,
            has no results at that batch size, and a warning is logged.

        Raises:
            ValueError: If one of the layers cannot be timed at all.
        """
        from .progress import ProgressBar

        if not isinstance(layers, Mapping):
            layers = {f"layer_{i}": layer for i, layer in enumerate(layers)}
        timed = {name: layer if isinstance(layer, Problem) else as_layer(layer) for name, layer in layers.items()}
        batch_sizes = list(batch_sizes)
        if any(rows < 1 for rows in batch_sizes):
            raise ValueError(f"a timing needs at least 1 row, got {min(batch_sizes)}")
        results: dict[str, dict[int, list[BenchmarkResult]]] = {name: {} for name in timed}
        with ProgressBar(len(timed) * len(batch_sizes), enabled=verbose) as bar:
            for name, layer in timed.items():
                for batch_size in batch_sizes:
                    bar.begin(f"{name}, {batch_size} rows")
                    try:
                        results[name][batch_size] = self.benchmark_layer(
                            layer, batch_size, None, num_warmup, num_iter, top_k=top_k, on_round=bar.round
                        )
                    # RuntimeError: MLX, out of memory.
                    except (MemoryError, ValueError, RuntimeError) as error:
                        _log.warning("skipping %s at %d rows: %s", name, batch_size, error)
                        results[name][batch_size] = []
                    bar.end()
        return results

    # Selection

    def select_kernel(
        self,
        batch_size: int,
        hidden_dim: int,
        bit_widths: Iterable[float],
        use_decode: bool = False,
        fallback_to_default: bool = True,
    ) -> KernelConfig | None:
        """The config for a call: exact match, then nearest batch size, then nearest hidden size, then the default.

        Args:
            batch_size: Rows.
            hidden_dim: Input size.
            bit_widths: Bit widths present, in any order.
            use_decode: Prefer decode entries if there are any. Default: ``False``.
            fallback_to_default: Whether to fall back to the table that the package predicts for this machine, then to
                the default of the widest bit width. Default: ``True``.
        """
        widths = distinct_widths(bit_widths)
        tables = [self.config, *([self._foreign] if self._foreign else [])]
        mine = self.device_name == self._here
        predicted = profile.predicted(self.device_name) if fallback_to_default and mine else None
        if predicted is not None:
            tables.append(predicted[1])
        found = answers.find(tables, self._device, (batch_size, hidden_dim, widths), use_decode)
        if found is not None:
            return found
        return lookup.default_entry(self.config, batch_size, widths) if fallback_to_default else None

    # Adaptation

    def record_latency(
        self,
        kernel_name: str,
        batch_size: int,
        latency_ms: float,
        hidden_dim: int | None = None,
        bit_widths: Iterable[float] | None = None,
        problem: Problem | None = None,
        config: KernelConfig | None = None,
    ) -> None:
        """Record the time of one call.

        Args:
            kernel_name: What ran.
            batch_size: Rows.
            latency_ms: Milliseconds, above 0.
            hidden_dim, bit_widths: What it ran on; left out, the sample counts for any.
            problem: Instead of both. Default: ``None``.
            config: The config that ran, where known. Default: ``None``.
        """
        if problem is not None:
            hidden_dim, bit_widths = problem.hidden, problem.widths
        widths = None if bit_widths is None else distinct_widths(bit_widths)
        self._adaptation.record(
            (kernel_name, config), (batch_size, hidden_dim, widths), latency_ms, self.config.adaptation_history_len
        )

    def adapt_selection(
        self, batch_size: int, hidden_dim: int, bit_widths: Iterable[float], top_k: int = 3
    ) -> KernelConfig | None:
        """What the recorded times say about a key.

        Args:
            batch_size, hidden_dim, bit_widths: The key.
            top_k: Candidates of lowest median that are compared with the incumbent. Default: ``3``.

        Returns:
            ``None`` where adaptation is disabled or no candidate has 5 samples. Else what :meth:`select_kernel` gives,
            or the fastest of the candidates that are significantly faster; with fewer than 5 samples of its own it
            yields to the candidate that has most. However often this is asked, equally fast candidates replace it
            with a probability of 5 % at most.
        """
        if not self.config.adaptation_enabled:
            return None
        key = batch_size, hidden_dim, distinct_widths(bit_widths)
        incumbent = self.select_kernel(*key)
        assert incumbent is not None  # at worst the default

        # A sample that came without a config counts for the config of its name.
        def config_of(recorded: tuple[str, KernelConfig | None]) -> KernelConfig:
            name, config = recorded
            return config or answers.config_named(name, self.config, self._device, key, incumbent)

        limit = self.config.adaptation_history_len
        return self._adaptation.leader(key, incumbent, top_k, config_of, limit)

    def clear_adaptation_history(self) -> None:
        """Forget all recorded times."""
        self._adaptation.clear()

    # Files

    def export_config(self, path: str | Path | None = None) -> str:
        """The profile as JSON; written to a file if there is one, merged with what the file holds.

        Args:
            path: Target. Default: ``None``, the constructor's ``config_path``; without one nothing is written.

        Raises:
            ProfileError: If the file belongs to another machine or build or is malformed; it is left as it is.
        """
        target = path if path is not None else self.config_path
        if target is not None:
            why = profile_files.foreign(self.config, self._device)
            if why is not None and Path(target).exists():
                raise ProfileError(
                    f"{target} is not overwritten: the tuner holds a foreign profile: {why}. Choose another output file"
                )
            self.config = profile_files.save(self.config, target)
            profile.refresh()
        return profile_json.encode(self.config).decode()

    @classmethod
    def load_config(cls, path: str | Path) -> MixedBPWAutoTuner:
        """A tuner over a profile, of whatever machine.

        Raises:
            FileNotFoundError: If there is no such file.
            ProfileError: If it is malformed; the message has the path of the bad field.
        """
        config = profile_files.load(path)
        device = config.fingerprint.device if config.fingerprint else None
        if device is not None and not machine.is_present(device):
            device = None
        tuner = cls(config.device_name, path, device=device)
        tuner.device_family = config.device_family
        return tuner

    def get_statistics(self) -> dict:
        """Counts: what was benchmarked, what the table holds, what was recorded."""
        table = self.config.lookup_table
        return {
            "device_name": self.device_name,
            "device_family": self.device_family,
            "benchmark_count": self.config.benchmark_count,
            "lookup_table_entries": sum(len(cell) for row in table.values() for cell in row.values()),
            "problems": len(self.config.problems),
            "rejected_configs": sum(len(e.rejected) for e in self.config.problems.values()),
            "adaptation_enabled": self.config.adaptation_enabled,
            "adaptation_keys": self._adaptation.keys,
            "adaptation_samples": self._adaptation.count,
        }
