"""The machine: its names, its fingerprint, its cores and caches, and how full its memory is."""

from .fingerprint import Fingerprint, canonical_name, check_device, device_family
from .machine import (
    default_device,
    device_name,
    fingerprint,
    hardware,
    is_present,
    last_level_cache,
    memory_bytes,
    memory_pressure,
    mlx_device,
)

__all__ = [
    "Fingerprint",
    "canonical_name",
    "check_device",
    "default_device",
    "device_family",
    "device_name",
    "fingerprint",
    "hardware",
    "is_present",
    "last_level_cache",
    "memory_bytes",
    "memory_pressure",
    "mlx_device",
]
