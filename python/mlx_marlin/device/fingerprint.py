"""A machine's names, and what a timing depends on besides the problem and the config."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from ..kernels import DEVICES

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a timing depends on besides the problem and the config.

    Attributes:
        device: ``"cpu"`` or ``"gpu"``.
        chip: Device name: MLX's own for the GPU, the model for the CPU; without "Apple ".
        cores: CPU cores that this process may use; GPU cores where the system tells, else 0.
        instruction_set: Of the CPU; ``""`` for the GPU.
        os: System and release.
        mlx_version: MLX's version.
        kernel_hash: SHA-256, shortened to 16 digits, of what the CPU kernels were built from, or of the shader sources
            and of what launches them.
    """

    device: Literal["cpu", "gpu"]
    chip: _Text
    cores: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    instruction_set: Annotated[str, msgspec.Meta(max_length=64)]
    os: _Text
    mlx_version: _Text
    kernel_hash: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{0,64}\Z")]

    def same_machine(self, other: Fingerprint) -> bool:
        """Whether timings of the two may be mixed: same device, chip, cores and instruction set."""
        return self._machine() == other._machine()

    def _machine(self) -> tuple:
        return self.device, canonical_name(self.chip).casefold(), self.cores, self.instruction_set


def check_device(device: str) -> str:
    """``device`` itself, if it is ``"cpu"`` or ``"gpu"``.

    Raises:
        ValueError: If it is neither.
    """
    if device not in DEVICES:
        raise ValueError(f'device must be "cpu" or "gpu", got {device!r}')
    return device


def canonical_name(name: str) -> str:
    """A device name without the maker's decorations: "Apple M4 Max" and "M4 Max" are the same."""
    name = re.sub(r"\((?:R|TM|C)\)", " ", name, flags=re.IGNORECASE)
    name = re.sub(r"\s@.*$|\bCPU\b|^\s*Apple\b", " ", name)
    return " ".join(name.split())


def device_family(name: str) -> str:
    """``"M1"`` to ``"M5"``, ``"CPU"`` or ``"Unknown"``, from a device name.

    A CPU's name ends in its instruction set in parentheses, as :func:`device_name` writes it, whatever the set's name;
    no GPU's does.
    """
    if re.search(r"\(\w+\)$", name.strip()) or name.strip().casefold() == "cpu":
        return "CPU"
    match = re.match(r"(M[1-5])\b", canonical_name(name))
    return match[1] if match else "Unknown"
