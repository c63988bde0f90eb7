"""Opening a work directory or a measurement: a new one, or that of an interrupted conversion, known by content."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..storage import atomic
from ..storage.safetensors import TensorInfo
from .job_state import JOB, LOCK, JobState, digest_of, hash_bytes, locked, told_job
from .source import Source
from .writer import FINISHED

WORK = ".convert"
"""Name of the work directory inside the output."""
MEASUREMENT = "measurement"
"""Name of the measurement's directory: of one size in the work directory, of several beside their folders."""

# What tells where a checkpoint comes from or how others run it.
_PROVENANCE = frozenset({
    "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map",
})  # fmt: skip
# What mlx-lm's loader and the converter look at, beside the fields of the model's arguments.
_LOOKED_AT = frozenset({
    "architectures", "model_type", "model_file", "text_config", "vision_config", "quantization", "quantization_config",
    "tie_word_embeddings", "num_nextn_predict_layers", "mtp_num_hidden_layers",
})  # fmt: skip
_DIGESTS = frozenset({"tensors", "calibration", "allocation"})  # of which only digests are kept
_SHOWN = 3  # of the differences of a kind
_SHOWN_LETTERS = 40  # of a value


def _without_provenance(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_provenance(v) for k, v in value.items() if k not in _PROVENANCE}


def related_config(config: dict) -> dict:
    """The keys of config.json that the result depends on; all but provenance where mlx-lm's class reads it freely."""
    from mlx_lm.models.base import BaseModelArgs
    from mlx_lm.utils import _get_classes

    related = _without_provenance(config)
    try:
        _, arguments = _get_classes(config)
        plain = getattr(arguments.from_dict, "__func__", None) is BaseModelArgs.from_dict.__func__  # type: ignore[attr-defined]
        fields = set(inspect.signature(arguments).parameters)
    except (AttributeError, KeyError, TypeError, ValueError):
        return related
    return {k: v for k, v in related.items() if k in fields | _LOOKED_AT} if plain else related


def _tensor_digest(tensor: TensorInfo) -> str:
    """SHA-256 of a tensor; read rather than mapped, as a file that becomes shorter must not end the process."""
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}\n".encode())
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start)
        if not hash_bytes(file, tensor.nbytes, digest):
            raise ValueError(f"{tensor.file} became shorter while it was read")
    return digest.hexdigest()


def content_of(source: Source, tokens: np.ndarray, tick: Callable[[str], None]) -> dict[str, dict]:
    """What the result of a conversion depends on beside its settings, as a JSON value.

    Args:
        source: The checkpoint; it may have been moved or copied.
        tokens: The calibration tokens.
        tick: Called with how much of the checkpoint has been read, at each tensor.
    """
    total = sum(t.nbytes for t in source.stored.values())
    tensors, read = {}, 0
    with ThreadPoolExecutor(kernels.cpu_threads()) as pool:
        for (name, tensor), found in zip(source.stored.items(), pool.map(_tensor_digest, source.stored.values())):
            tensors[name] = found
            read += tensor.nbytes
            tick(f"reading the checkpoint once, to know it again: {read / 1e9:.1f} of {total / 1e9:.1f} GB")
    calibration = hashlib.sha256(f"{tokens.dtype} {tokens.shape}\n".encode() + tokens.tobytes()).hexdigest()
    return {
        "config.json": related_config(source.config),
        "calibration": {"tokens": calibration},
        "tensors": tensors,
    }


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def differences(begun: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> list[str]:
    """What differs between two identities, by name."""
    found = []
    for kind in now:
        before, after = begun.get(kind, {}), now[kind]
        names = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n) or (n in before) != (n in after)]
        for name in names[:_SHOWN]:
            if name not in before or name not in after:
                found.append(f"{kind}: {name} is {'new' if name in after else 'gone'}")
            elif kind in _DIGESTS:
                found.append(f"{kind}: {name} differs")
            else:
                found.append(f"{kind}: {name} was {_short(before[name])}, is {_short(after[name])}")
        if len(names) > _SHOWN:
            found.append(f"{kind}: {len(names) - _SHOWN} more")
    return found


def check_place(output: Path, resume: bool) -> None:
    """See that a conversion may begin or go on here.

    Raises:
        FileNotFoundError: If the output is a link that leads nowhere.
        FileExistsError: If something else is there.
        ValueError: If the work directory is a link.
    """
    _check_directory(output)
    work = output / WORK
    if work.is_symlink():
        raise ValueError(f"{work} is a link, where a conversion keeps what is not finished; remove it")
    if not output.exists() or not any(path.name != FINISHED for path in output.iterdir()):
        return
    if not resume:
        raise FileExistsError(f"{output} is not empty; choose another directory, or resume what was begun there")
    if not work.is_dir():
        done = "a finished model" if (output / "config.json").is_file() else "other files"
        raise FileExistsError(f"{output} holds {done}, not an interrupted conversion; choose another directory")


def check_several(output: Path, resume: bool) -> None:
    """See that conversions to several sizes may begin or go on here, each in a folder.

    Raises:
        FileNotFoundError: If the output is a link that leads nowhere.
        FileExistsError: If something else is there.
    """
    _check_directory(output)
    if not output.exists() or not any(output.iterdir()):
        return
    if not resume:
        raise FileExistsError(f"{output} is not empty; choose another directory, or resume what was begun there")
    if (output / WORK).exists() or (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a conversion to one size; choose another directory for several")


def check_measurement(directory: Path) -> None:
    """See that a measurement may begin or go on here.

    Raises:
        FileNotFoundError: If the directory is a link that leads nowhere.
        FileExistsError: If something else is there.
    """
    _check_directory(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / LOCK).exists():
        raise FileExistsError(f"{directory} holds other files, not a measurement; choose another directory")


def _check_directory(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which is not there")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is not a directory; choose another name")


@contextmanager
def opened_work(output: Path, now: dict[str, dict], tell: Callable[[str], None]) -> Iterator[JobState]:
    """The work directory of a conversion, for the length of a ``with`` block; no other conversion enters it.

    Args:
        output: Directory of the model.
        now: What the conversion depends on.
        tell: Called with what is found damaged or foreign, and made again.

    Raises:
        ValueError: If the conversion there was begun with something else, or another one is running.
    """
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, output):
        shutil.rmtree(output / FINISHED, ignore_errors=True)
        atomic.remove_leftovers(output)
        yield _begun(work, f"the conversion in {output}", "resume with the same", now, tell)


@contextmanager
def opened_measurement(
    directory: Path, content: dict[str, dict], codebook: str, seed: int, tell: Callable[[str], None]
) -> Iterator[JobState]:
    """The directory of a measurement, for the length of a ``with`` block; no other conversion enters it.

    Args:
        directory: The directory.
        content: From :func:`content_of`.
        codebook: Of the conversion.
        seed: Of the conversion.
        tell: Called with what is found damaged or foreign, and made again.

    Raises:
        ValueError: If the measurement there was begun with something else, or another conversion uses it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, directory):
        now = {"settings": {"codebook": codebook, "seed": seed}, **content}
        yield _begun(directory, f"the measurement in {directory}", "convert with the same", now, tell)


def stored_measurement(directory: Path, tell: Callable[[str], None]) -> JobState:
    """A measurement as it is, to be read.

    Raises:
        ValueError: If there is none.
    """
    begun = told_job(directory)
    if begun is None:
        raise ValueError(
            f"{directory} holds no measurement, or its {JOB} is damaged; mlx_marlin-convert measure makes one"
        )
    return JobState(directory, digest_of(begun), tell)


def _begun(directory: Path, what: str, advice: str, now: dict[str, dict], tell: Callable[[str], None]) -> JobState:
    """The state of a directory that is locked, begun now or before."""
    atomic.remove_leftovers(directory)
    now = json.loads(json.dumps(now))  # as it is read again
    state = JobState(directory, digest_of(now), tell)
    begun = told_job(directory)
    if begun is None and any(path.is_file() and path.name != LOCK for path in directory.iterdir()):
        tell(f"{directory / JOB} is missing or damaged; parts that were made from the same are taken up")
    changed = differences(begun, now) if begun is not None else []
    if changed:
        raise ValueError(
            f"{what} was begun with something else ({'; '.join(changed)}); {advice}, or choose another directory"
        )
    if begun is None:
        state.write_json(JOB, now)
    return state
