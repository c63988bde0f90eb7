"""The rules of selection that look at one call only: the kernel that its shapes suggest, and what may compete
with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from numbers import Real

from .. import kernels
from ..kernels import Problem, Triple
from . import choices
from .evidence import Ledger

BUCKETS = ("1", "2-16", "17-32", "33-128", "129+")
_BUCKET_ENDS = (1, 16, 32, 128)
# Share of the rows from which one expert's work outweighs the rest.
LOPSIDED_SHARE = 0.85


def batch_bucket(batch_size: int) -> str:
    """The class of batch sizes whose timings are kept together: one of :data:`BUCKETS`."""
    for label, end in zip(BUCKETS, _BUCKET_ENDS):
        if batch_size <= end:
            return label
    return BUCKETS[-1]


def bit_family(active_expert_bits: Sequence[float]) -> str:
    """``"fast_2bit"`` if over half of the experts have 2 bits, ``"mixed_bpw"`` if 2, 3 and 4 occur, else
    ``"standard"``.
    """
    if 2 * sum(bits == 2 for bits in active_expert_bits) > len(active_expert_bits):
        return "fast_2bit"
    return "mixed_bpw" if {2, 3, 4} <= set(active_expert_bits) else "standard"


def by_table(problem: Problem | None, fp32acc: bool) -> tuple[str, str] | None:
    """Rule 6 for the tuned table: the kernel of the problem's entry, where a profile has one."""
    choice = None if problem is None else choices.choose(problem)
    if choice is None or not choice.tuned:
        return None
    parts = parse(choice.config.kernel_name)
    return make(parts.variant, parts.triple, mixed=parts.mixed, fp32acc=fp32acc), f"tuned_table: {choice.reason}"


def by_rules(
    batch_size: int, triple: Triple | None, use_fp32_acc: bool, pattern: dict | None, problem: Problem | None
) -> tuple[str, str]:
    """Rules 5, 4 and 2: the kernel that the shapes alone suggest, and why."""
    rows = _top_expert_rows(batch_size, pattern, problem)
    if rows is not None:
        name = make(kernels.default_variant(rows), fp32acc=use_fp32_acc)
        return name, f"activation_pattern: one expert has {rows} of {batch_size} rows"
    if batch_size == 1 and triple is not None:
        name = make("decode", triple, fp32acc=use_fp32_acc)
        return name, "specialized_decode: all active experts have gate {}, up {}, down {} bits".format(*triple)
    name = make(kernels.default_variant(batch_size), fp32acc=use_fp32_acc)
    return name, f"batch_size: {batch_size} row{'s' * (batch_size > 1)}"


def _top_expert_rows(batch_size: int, pattern: dict | None, problem: Problem | None) -> int | None:
    """Rows of the top expert, where it has most of them although each row has several experts."""
    if pattern is None or batch_size < 2:
        return None
    share = fraction('pattern["top_expert_share"]', pattern.get("top_expert_share", 0.0))
    if problem is not None:
        top_k = problem.top_k
    else:  # without the other metrics the caller vouches for top-k >= 2
        slots = pattern.get("tokens_per_expert_avg", math.inf) * pattern.get("num_activated_experts", 1)
        top_k = slots / batch_size
    if share < LOPSIDED_SHARE or top_k < 2:
        return None
    return round(share * batch_size)


def candidates(batch_size: int, triple: Triple | None, fp32acc: bool, ledger: Ledger[str] | None) -> list[str]:
    """The kernels that compete for a call: every variant, the triple's own at one row, and what was timed
    besides.
    """
    names = list(_variant_names(fp32acc))
    if batch_size == 1 and triple is not None:
        names.append(make("decode", triple, fp32acc=fp32acc))
    if ledger is not None:
        for name in ledger.histories:
            parts = parse(name)
            if name not in names and parts.fp32acc == fp32acc and parts.triple in (None, triple):
                names.append(name)
    return names


def nearest(name: str, triple: Triple | None, available: Iterable[str]) -> str:
    """The available kernel that is most like the wanted one: never another triple's where anything else is
    left.
    """
    wanted = parse(name)

    def unlikeness(candidate: str) -> tuple:
        parts = parse(candidate)
        return (
            parts.triple not in (None, triple),
            parts.variant != wanted.variant,
            parts.variant != "base",  # runs any number of rows with the least scratch
            parts.fp32acc != wanted.fp32acc,
            parts.mixed != wanted.mixed,
            parts.triple != wanted.triple,
            candidate,
        )

    return min(available, key=unlikeness)


@cache
def _variant_names(fp32acc: bool) -> tuple[str, ...]:
    return tuple(make(variant, fp32acc=fp32acc) for variant in kernels.VARIANTS)


parse = lru_cache(maxsize=4096)(kernels.parse_name)
make = lru_cache(maxsize=4096)(kernels.make_name)


def fraction(what: str, value: float) -> float:
    number = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    if not number or not 0.0 <= value <= 1.0:
        raise ValueError(f"{what} must be a number in [0, 1], got {value!r}")
    return float(value)
