"""Codes that one size found and another can use.

A linear's codes depend on what it sees of the layers below, and these differ from size to size: only the first layer
sees the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..storage.safetensors import read_header
from .job_state import JobState, states_digest
from .jobs import Job
from .spill import States, StoredTensor

PART = "searched-0000.safetensors"


def searched(
    state: JobState,
    jobs: Sequence[Job],
    widths: Mapping[str, float],
    before: States,
    search: Callable[[list[Job]], dict[str, StoredTensor]],
) -> dict[str, StoredTensor]:
    """What is stored of the first layer's linears: of earlier sizes, or found now for this and later ones.

    Args:
        state: The measurement, beside which they are kept.
        jobs: The linears.
        widths: K of each, by name.
        before: Hidden states before the layer.
        search: Finds what is stored of some of the linears.
    """
    made_from = {"before": states_digest(before)}
    stored = _stored(state) if state.seal(PART, made_from) is not None else {}

    def kept_name(name: str) -> str:
        """A tensor's name here, with the width of its linear."""
        return f"{widths[name.rpartition('.')[0]]}:{name}"

    fresh = search([job for job in jobs if kept_name(f"{job.name}.trellis") not in stored])
    if fresh:
        state.write_tensors(PART, {**stored, **{kept_name(name): t for name, t in fresh.items()}}, made_from)
        stored = _stored(state)  # the old file is gone
    names = {kept: kept.partition(":")[2] for kept in stored}
    return {name: stored[kept] for kept, name in names.items() if kept_name(name) == kept}


def _stored(state: JobState) -> dict[str, StoredTensor]:
    infos = read_header(state.directory / PART)
    return {name: StoredTensor(info.dtype, info.shape, info.read) for name, info in infos.items()}
