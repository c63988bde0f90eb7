"""Convert a checkpoint to EXL3: measure, allocate, quantize layer by layer, assemble; one size or several.

Every step leaves its result in ``<output>/.convert`` or beside the measurement, sealed; a later run continues there.
``.convert`` is removed when a model is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..storage import atomic
from .allocation import Allocation, Item, as_given
from .budget import candidate_widths, linears, model_sizes
from .extras import Extras, find_extras
from .head import head_name
from .job_state import JobState, digest_of
from .layers import LayerQuantizer
from .measurement import Measurement, allocated, opened_runner, teller
from .plan import plan_table, read_table
from .progress import Clock, Progress
from .resume import (
    MEASUREMENT,
    WORK,
    check_measurement,
    check_place,
    check_several,
    content_of,
    opened_measurement,
    opened_work,
)
from .runner import Runner
from .settings import Settings, check_settings
from .writer import FINISHED, assemble, finish


def convert(
    model: str | Path,
    output: str | Path,
    *,
    bits: float | Sequence[float] | None = None,
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
    job: str | Path | None = None,
    allocation: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Allocation | list[Allocation]:
    """Quantize a checkpoint that mlx-lm can run into an EXL3 directory, or into several sizes from one measurement.

    Args:
        model: Directory of a Hugging Face checkpoint, fp16, bf16, fp32, fp8 in blocks, mxfp4 or nvfp4, in the names of
            the original or of mlx-lm.
        output: Directory to be made.
        bits: Stored bits per weight of the quantized layers: codes, suh, svh and biases, without the head. For a list
            of sizes ``output`` gets a folder for each, ``2.25bpw``, with the files that a conversion to that size alone
            gives. Default: ``None``, with ``allocation`` only.
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
            now. Files of it that are damaged or foreign are told, and made again. Of several sizes, those that are
            complete are left as they are, and others may be added. Default: ``False``.
        seed: Seed of the random signs. The result depends on nothing else than the arguments. Default: ``0``.
        trust_remote_code: Whether a tokenizer may run code from the checkpoint. Default: ``False``.
        job: Directory of the measurement, used if it is there, made by this if not, and kept. Default: ``None``: for
            several sizes ``measurement`` in ``output``; for one size it is not kept.
        allocation: Table of the widths in place of ``bits``: a ``plan.txt``, or what :func:`allocate` wrote, as it is
            or edited. Default: ``None``.
        progress: Called with a :class:`Progress` after each finished piece of work.

    Returns:
        Allocation: the widths, the stored bits per weight, the loss and its proven bound; a list for several sizes.

    Raises:
        ValueError: If an argument or the checkpoint is not fit for this, what is to be resumed was begun with something
            else, or another conversion writes to ``output``.
        FileExistsError: If ``output`` holds files and ``resume`` is not set.
        OSError: If a file cannot be read or written; what is done stays for ``resume``.
    """
    from threadpoolctl import threadpool_limits

    sizes = _sizes(bits, allocation)

    def settings_for(size: float | None) -> Settings:
        asked = Settings(
            bits=size,
            head_bits=head_bits,
            embed_bits=embed_bits,
            mtp_bits=mtp_bits,
            vision_bits=vision_bits,
            codebook=codebook,
            half_rates=bool(half_rates),
            mixed=mixed,
            seed=int(seed),
        )
        return check_settings(asked)

    settings = [settings_for(size) for size in sizes]
    clock = Clock(progress)
    runner = opened_runner(model, calibration, trust_remote_code, clock)
    target, table = Path(output), None if allocation is None else Path(allocation)
    asked = _check(runner, target, settings, table)
    is_one = not isinstance(bits, Sequence)
    places = [target] if is_one else [target / folder_of(s) for s in settings]
    _check_places(target, places, resume, is_one)
    if job is not None:
        _check_job(Path(job), places)
    # In layers: measured, and for each size quantized; its head.
    clock.total = runner.count + float(len(sizes) * (runner.count + 1))
    with threadpool_limits(1, "blas"):  # sums must not depend on the machine's cores; experts run side by side
        content = content_of(runner.source, runner.tokens, clock.tick)
        several = _Conversions(runner, asked, content, codebook, int(seed), clock)
        if is_one:
            return several.one(settings[0], target, None if job is None else Path(job))
        return several.all(settings, target, target / MEASUREMENT if job is None else Path(job))


def folder_of(settings: Settings) -> str:
    """Name of the folder of one of several sizes, as EXL3's publishers name branches."""
    return f"{settings.bits}bpw"


def _sizes(bits: float | Sequence[float] | None, allocation: str | Path | None) -> list[float | None]:
    if (bits is None) == (allocation is None):
        raise ValueError("either bits or an allocation is wanted, got " + ("none" if bits is None else "both"))
    if bits is None:
        return [None]
    if not isinstance(bits, Sequence):
        return [float(bits)]
    sizes = [float(size) for size in bits]
    twice = [size for i, size in enumerate(sizes) if size in sizes[:i]]
    if twice or not sizes:
        raise ValueError(f"bits must list different sizes, got {'none' if not sizes else f'{twice[0]} twice'}")
    return list(sizes)


def _check_places(output: Path, places: list[Path], resume: bool, is_one: bool) -> None:
    """See that the files may be written; folders of several sizes may hold what is complete."""
    if is_one:
        check_place(output, resume)
        return
    check_several(output, resume)
    for place in places:
        if not (resume and (place / "config.json").is_file()):
            check_place(place, resume)


def _check_job(job: Path, places: list[Path]) -> None:
    """See that the measurement may be there, and not among the files of a model, which would be published with it."""
    for place in places:
        if job.resolve() in (place.resolve(), (place / WORK).resolve()):
            raise ValueError(f"the measurement would lie among the files of the model in {place}; choose another job")
    check_measurement(job)


@dataclass
class _Checked:
    """What is known before the work.

    Attributes:
        head: Name of the output projection.
        widths: Of a table, K of each linear by name; else ``None``.
        extras: What is done with prediction layers and towers.
    """

    head: str
    widths: dict[str, float] | None
    extras: Extras


def _check(runner: Runner, output: Path, settings: list[Settings], table: Path | None) -> _Checked:
    """See that all conversions can be done.

    Raises:
        ValueError: If one cannot.
    """
    source, model, some = runner.source, runner.model, settings[0]
    source.side_files(output)
    head, sizes = head_name(model, source), model_sizes(model, some.codebook, some.widths)
    for s in settings:
        if s.bits is not None:
            candidate_widths(sizes, s.bits, s.widths)
    widths = None
    if table is not None:
        groups = {linear.name: linear.group for linear in linears(model)}
        widths = read_table(table, groups, some.widths, some.mixed)
    return _Checked(head, widths, find_extras(source, some, len(model.layers)))


class _Conversions:
    """Conversions of one checkpoint."""

    def __init__(
        self, runner: Runner, asked: _Checked, content: dict[str, dict], codebook: str, seed: int, clock: Clock
    ):
        self.runner, self.asked, self.content = runner, asked, content
        self.codebook, self.seed, self.clock, self.tell = codebook, seed, clock, teller(clock)

    def one(self, settings: Settings, output: Path, job: Path | None) -> Allocation:
        """Convert to one size; without a job the measurement goes with the work directory."""
        with opened_work(output, self._identity(settings), self.tell) as work:
            place = work.directory / MEASUREMENT if job is None else job
            with opened_measurement(place, self.content, self.codebook, self.seed, self.tell) as measured:
                layers = Measurement(measured, self.runner, self.codebook, self.seed).items()
                found = _Conversion(self.runner, output, work, measured, settings, self.asked).run(layers)
            finish(work.directory)
        return found

    def all(self, settings: list[Settings], output: Path, job: Path) -> list[Allocation]:
        """Convert to several sizes, a folder each."""
        with opened_measurement(job, self.content, self.codebook, self.seed, self.tell) as measured:
            layers = Measurement(measured, self.runner, self.codebook, self.seed).items()
            return [self._size(s, output / folder_of(s), measured, layers) for s in settings]

    def _size(self, settings: Settings, output: Path, measured: JobState, layers: list[list[Item]]) -> Allocation:
        identity = self._identity(settings)
        record = f"complete-{digest_of(identity)[:16]}.json"
        if (output / "config.json").is_file() and not (output / WORK).exists():
            known = measured.read_json(record)
            if known is None or not known.items() <= _files(output).items():  # a model card may have been added
                raise FileExistsError(
                    f"{output} holds a model that is not known to be this conversion's; choose another directory, or "
                    "remove it"
                )
            shutil.rmtree(output / FINISHED, ignore_errors=True)
            self.clock.skip(self.runner.count + 1.0)
            return _allocation(layers, settings, self.asked)
        with opened_work(output, identity, self.tell) as work:
            found = _Conversion(self.runner, output, work, measured, settings, self.asked, folder_of(settings)).run(
                layers
            )
            measured.write_json(record, _files(output))
            finish(work.directory)
        return found

    def _identity(self, settings: Settings) -> dict[str, dict]:
        """Everything that a conversion's result depends on."""
        given = {} if self.asked.widths is None else {"allocation": {"widths": digest_of(self.asked.widths)}}
        return {"settings": vars(settings), **self.content, **given}


def _files(output: Path) -> dict[str, int]:
    """The files of a model and their bytes."""
    inside = (path for path in output.rglob("*") if path.is_file())
    names = ((path.relative_to(output), path.stat().st_size) for path in inside)
    return {str(name): size for name, size in names if not name.parts[0].startswith(".")}


def _allocation(layers: list[list[Item]], settings: Settings, asked: _Checked) -> Allocation:
    items = [item for layer in layers for item in layer]
    if settings.bits is None:
        assert asked.widths is not None  # that is what gives the size
        return as_given(items, asked.widths)
    return allocated(items, settings.bits, settings.mixed, settings.widths)


class _Conversion:
    """One conversion, from the plan to the last file.

    Args:
        runner: The model.
        output: Directory of the result.
        work: The work directory.
        measured: Directory of the measurement.
        settings: The settings.
        asked: What is known before.
        folder: Name of the result among several. Default: ``""``.
    """

    def __init__(
        self,
        runner: Runner,
        output: Path,
        work: JobState,
        measured: JobState,
        settings: Settings,
        asked: _Checked,
        folder: str = "",
    ):
        self.runner, self.output, self.work, self.measured = runner, output, work, measured
        self.settings, self.asked = settings, asked
        self.of = f" for {folder}" if folder else ""

    def run(self, layers: list[list[Item]]) -> Allocation:
        """Convert; what is left is to remove the work directory."""
        allocation = _allocation(layers, self.settings, self.asked)
        plan = plan_table(allocation, self.asked.extras.notes)
        atomic.write_text(self.work.directory / "plan.txt", plan)
        quantizer = LayerQuantizer(self.runner, self.work, self.measured, self.settings, allocation, self.of)
        files = quantizer.layers([[item.name for item in layer] for layer in layers])
        files.append(quantizer.head(self.asked.head))
        files += quantizer.others(self.asked.extras)
        self.runner.clock.advance(f"assembling{self.of}", 1.0)
        assemble(
            self.runner.source,
            self.output,
            plan,
            files,
            head=self.asked.head,
            replaced=self.runner.model.names.stacked,
            extras=self.asked.extras,
            settings=self.settings,
            calibration=self.runner.tokens.shape,
        )
        return allocation
