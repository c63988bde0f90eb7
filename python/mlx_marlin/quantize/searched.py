"""Codes that one size found and another can use.

A linear's codes depend on what it sees of the layers below, and these differ from size to size: only the first layer
sees the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..storage.safetensors import Tensor, read_header
from .job_state import JobState, States, states_digest
from .jobs import Job
from .stored import stored_codes, stored_tensors
from .weight import Codes

PART = "searched-0000.safetensors"


def _stored_name(name: str, k: float) -> str:
    return f"{k}:{name}"


def searched(
    state: JobState,
    jobs: Sequence[Job],
    widths: Mapping[str, float],
    codebook: str,
    before: States,
    search: Callable[[list[Job]], list[Codes]],
) -> list[Codes]:
    """The codes of the first layer's linears: those of earlier sizes, and what is found now for this and later ones.

    Args:
        state: The measurement, beside which they are kept.
        jobs: The linears.
        widths: K of each, by name.
        codebook: Their codebook.
        before: Hidden states before the layer.
        search: Finds the codes of some of the linears.
    """
    made_from = {"before": states_digest(before)}
    stored = read_header(state.directory / PART) if state.seal(PART, made_from) is not None else {}

    def is_known(job: Job) -> bool:
        return f"{_stored_name(job.name, widths[job.name])}.trellis" in stored

    found = iter(search([job for job in jobs if not is_known(job)]))
    result, fresh = [], {}
    for job in jobs:
        name = _stored_name(job.name, widths[job.name])
        if is_known(job):
            result.append(stored_codes(name, stored, codebook, job.shape))
        else:
            result.append(next(found))
            fresh.update(stored_tensors(name, result[-1], None))
    if fresh:
        kept = {name: Tensor(info.dtype, info.shape, info.read()) for name, info in stored.items()}
        state.write_tensors(PART, {**kept, **fresh}, made_from)
    return result
