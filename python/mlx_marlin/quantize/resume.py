"""Opening a work directory: a new one, or that of an interrupted conversion, known by content."""

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
from .settings import Settings
from .source import Source
from .writer import FINISHED

WORK = ".convert"
"""Name of the work directory inside the output."""

# What tells where a checkpoint comes from or how others run it.
_PROVENANCE = frozenset({
    "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map",
})  # fmt: skip
# What mlx-lm's loader and the converter look at, beside the fields of the model's arguments.
_LOOKED_AT = frozenset({
    "architectures", "model_type", "model_file", "text_config", "vision_config", "quantization", "quantization_config",
    "tie_word_embeddings", "num_nextn_predict_layers", "mtp_num_hidden_layers",
})  # fmt: skip
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


def identity(source: Source, settings: Settings, tokens: np.ndarray, tick: Callable[[str], None]) -> dict[str, dict]:
    """Everything that a conversion's result depends on, as a JSON value; ``tick`` is told how far that is."""
    total = sum(t.nbytes for t in source.stored.values())
    tensors, read = {}, 0
    with ThreadPoolExecutor(kernels.cpu_threads()) as pool:
        for (name, tensor), found in zip(source.stored.items(), pool.map(_tensor_digest, source.stored.values())):
            tensors[name] = found
            read += tensor.nbytes
            tick(f"reading the checkpoint once, to know it again: {read / 1e9:.1f} of {total / 1e9:.1f} GB")
    calibration = hashlib.sha256(f"{tokens.dtype} {tokens.shape}\n".encode() + tokens.tobytes()).hexdigest()
    value = {
        "settings": vars(settings),
        "config.json": related_config(source.config),
        "calibration": {"tokens": calibration},
        "tensors": tensors,
    }
    return json.loads(json.dumps(value))


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
            elif kind in ("tensors", "calibration"):
                found.append(f"{kind}: {name} differs")
            else:
                found.append(f"{kind}: {name} was {_short(before[name])}, is {_short(after[name])}")
        if len(names) > _SHOWN:
            found.append(f"{kind}: {len(names) - _SHOWN} more")
    return found


def _check_place(output: Path, resume: bool) -> None:
    """See that a conversion may begin or go on here.

    Raises:
        FileNotFoundError: If the output is a link that leads nowhere.
        FileExistsError: If something else is there.
        ValueError: If the work directory is a link.
    """
    if output.is_symlink() and not output.exists():
        raise FileNotFoundError(f"{output} is a link to {output.readlink()}, which is not there")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is not a directory; choose another name")
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


@contextmanager
def opened(
    output: Path,
    resume: bool,
    source: Source,
    settings: Settings,
    tokens: np.ndarray,
    tell: Callable[[str], None],
    tick: Callable[[str], None],
) -> Iterator[JobState]:
    """The work directory, for the length of a ``with`` block; no other conversion enters it.

    Args:
        output: Directory of the model.
        resume: Whether to continue what is there.
        source: The checkpoint; it may have been moved or copied.
        settings: The settings.
        tokens: The calibration tokens.
        tell: Called with what is found damaged or foreign, and made again.
        tick: Called with how much of the checkpoint has been read, at each tensor.

    Raises:
        FileExistsError: If there are files and ``resume`` is not set, or files of something else.
        ValueError: If the conversion there was begun with something else, or another one is running.
    """
    _check_place(output, resume)
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        shutil.rmtree(output / FINISHED, ignore_errors=True)
        for directory in (output, work):
            atomic.remove_leftovers(directory)
        now = identity(source, settings, tokens, tick)
        state = JobState(work, digest_of(now), tell)
        begun = told_job(work)
        if begun is None and any(path.name != LOCK for path in work.iterdir()):
            tell(f"{work / JOB} is missing or damaged; parts that were made from the same are taken up")
        changed = differences(begun, now) if begun is not None else []
        if changed:
            raise ValueError(
                f"the conversion in {output} was begun with something else ({'; '.join(changed)}); "
                "resume with the same, or choose another directory"
            )
        if begun is None:
            state.write_json(JOB, now)
        yield state
