"""What tables of configs answer to (rows, hidden size, widths)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .. import kernels
from ..kernels import KernelConfig
from ..profile import lookup
from ..profile.schema import AutotuneConfig

Key = tuple[int, int, tuple[float, ...]]


def find(tables: Iterable[AutotuneConfig], device: str, key: Key, use_decode: bool) -> KernelConfig | None:
    """What the first table that knows the key or a near one says; of a table its decode entries first if asked."""
    for table in tables:
        for wanted in (_is_decode, None) if use_decode else (None,):
            found = lookup.find(table, device, *key, wanted)
            if found is not None:
                return found
    return None


def config_named(name: str, table: AutotuneConfig, device: str, key: Key, incumbent: KernelConfig) -> KernelConfig:
    """The config that a kernel's name stands for: the incumbent's, else the table's, else the default tiles."""
    if name == incumbent.kernel_name:
        return incumbent
    batch_size, _, widths = key
    known = lookup.find(table, device, *key, lambda c: c.kernel_name == name)
    default = lookup.default_entry(table, batch_size, widths)
    return known or replace(default, kernel_name=name, kernel_variant=_variant_of(name, batch_size))


def _variant_of(kernel_name: str, batch_size: int) -> str:
    """The variant in a name; names that are not ours count for the variant of the rows."""
    try:
        return kernels.parse_name(kernel_name).variant
    except ValueError:
        return kernels.default_variant(batch_size)


def _is_decode(config: KernelConfig) -> bool:
    return config.kernel_variant == "decode"
