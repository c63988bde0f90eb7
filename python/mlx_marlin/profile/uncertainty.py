"""How far a predicted time can be off, and which configs that leaves open."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..kernels import KernelConfig

_Time = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]

# A range is told where an end of it is farther than this from the prediction: what the cost model is held to on the
# kernels that others have measured (bench/metal/cost.py).
TOLERANCE = 0.25


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quantity that nobody has measured here.

    Attributes:
        low, likely, high: The least, the predicted and the largest value that published figures allow; in this order.
    """

    low: _Time
    likely: _Time
    high: _Time

    def __post_init__(self) -> None:
        if not self.low <= self.likely <= self.high:
            raise ValueError(f"a range needs low <= likely <= high, got {self.low}, {self.likely}, {self.high}")


class Uncertainty(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A predicted time as intercept and slope: ``stages * stage_us + work_us``, both of them ranges.

    Attributes:
        stages: Dependent stages of a call, whose number does not depend on the work.
        stage_us: Fixed cost of each, in microseconds.
        work_us: Time of all that the work takes, in microseconds.
        contenders: Other configs that are the fastest somewhere in the range, by what they save there.
        saved: Part of the time that the first contender saves there at most; 0 without contenders.
    """

    stages: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    stage_us: Range
    work_us: Range
    contenders: tuple[KernelConfig, ...] = ()
    saved: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0

    @property
    def total_us(self) -> Range:
        """The time of a call, in microseconds."""
        return Range(
            *(self.stages * getattr(self.stage_us, e) + getattr(self.work_us, e) for e in Range.__struct_fields__)
        )

    @property
    def matters(self) -> bool:
        """Whether an end of the range is more than :data:`TOLERANCE` away from the prediction."""
        total = self.total_us
        return total.high > (1 + TOLERANCE) * total.likely or total.low * (1 + TOLERANCE) < total.likely

    def __str__(self) -> str:
        total, stage, work = self.total_us, self.stage_us, self.work_us
        text = (
            f"predicted {total.likely:.3g} us, {total.low:.3g} to {total.high:.3g}: {self.stages} dependent stage"
            f"{'s' * (self.stages > 1)} of {stage.low:.3g} to {stage.high:.3g} us, work of {work.low:.3g} to "
            f"{work.high:.3g} us"
        )
        if not self.contenders:
            return text
        c = self.contenders[0]
        return (
            f"{text}; {c.kernel_variant} {c.tile_size_m} x {c.tile_size_n} with {c.simdgroups} simdgroups saves up to "
            f"{100 * self.saved:.0f} % within that range, mlx_marlin-tune decides"
        )
