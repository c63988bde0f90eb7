"""This machine: its fingerprint, its cores and caches, and how full its memory is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache, lru_cache
from pathlib import Path

import mlx.core as mx

from .. import ops
from ..kernels import Hardware
from ..kernels.cpu import cpu_threads
from ..kernels.metal import gpu_cores
from .fingerprint import Fingerprint, canonical_name, check_device, device_family

# Apple publishes no size for the system-level cache; 96 MB (M1 Ultra, M3 Ultra) is the largest that has been measured.
_APPLE_CACHE_BYTES = 96 << 20
# Where a machine does not tell: the largest last-level cache of current desktop processors.
_UNKNOWN_CACHE_BYTES = 128 << 20
# First-level data cache of a GPU core (philipturner/metal-benchmarks). Later families share one pool between caches,
# registers and threadgroup memory, and nobody has published its size.
_GPU_L1 = {"M1": 8 << 10, "M2": 8 << 10}
_CPUS = Path("/sys/devices/system/cpu")


def default_device() -> str:
    """``"gpu"`` where MLX's default device is one, else ``"cpu"``."""
    return ops.device_of(None)


def mlx_device(device: str) -> mx.Device:
    """``"cpu"`` or ``"gpu"`` as MLX's device."""
    return mx.Device(mx.gpu if check_device(device) == "gpu" else mx.cpu)


def is_present(device: str) -> bool:
    """Whether this machine has a CPU or GPU that MLX can use."""
    return mx.is_available(mlx_device(device))


@cache
def device_name(device: str) -> str:
    """MLX's device name for the GPU ("M4 Max"); for the CPU model and instruction set ("Intel Xeon (avx512)")."""
    if check_device(device) == "cpu":
        return f"{_cpu_model()} ({ops.instruction_set()})"
    if not is_present(device):
        raise ValueError('this machine has no GPU that MLX can use; use device "cpu"')
    return canonical_name(str(mx.device_info(mx.gpu)["device_name"]))


@cache
def fingerprint(device: str) -> Fingerprint:
    """The fingerprint of this machine for one of its devices.

    Args:
        device: ``"cpu"`` or ``"gpu"``.
    """
    gpu = check_device(device) == "gpu"
    return Fingerprint(
        device="gpu" if gpu else "cpu",
        chip=device_name("gpu") if gpu else _cpu_model(),
        cores=gpu_cores() if gpu else cpu_threads(),
        instruction_set="" if gpu else ops.instruction_set(),
        os=f"{platform.system()} {platform.release()}",
        mlx_version=importlib.metadata.version("mlx"),
        kernel_hash=_kernel_hash(device),
    )


def memory_bytes(device: str) -> int:
    """Memory that calls on a device can use: the recommended working set on the GPU, physical memory on the CPU."""
    if check_device(device) == "gpu":
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_pressure(device: str | None = None) -> float:
    """MLX's active memory over :func:`memory_bytes`, in [0, 1]."""
    return min(1.0, mx.get_active_memory() / memory_bytes(device or default_device()))


@lru_cache(maxsize=1)
def last_level_cache() -> int:
    """Bytes of the largest cache that this machine reports (on Apple silicon: an upper bound)."""
    sizes = [size for _, size, _ in _cpu_caches(0)]
    if sizes:
        return max(sizes)
    return _APPLE_CACHE_BYTES if platform.system() == "Darwin" else _UNKNOWN_CACHE_BYTES


@cache
def hardware(device: str) -> Hardware:
    """Cores, caches and limits of one of this machine's devices, as far as the system tells.

    Args:
        device: ``"cpu"`` or ``"gpu"``.
    """
    if check_device(device) == "gpu":
        return Hardware(cores=gpu_cores(), gpu_l1=_GPU_L1.get(device_family(device_name("gpu")), 0))
    caches = _apple_caches() if platform.system() == "Darwin" else _linux_caches()
    fast = int(_sysctl("hw.perflevel0.logicalcpu") or 0) or _fast_cores()
    return Hardware(cores=cpu_threads(), fast_cores=min(fast or cpu_threads(), cpu_threads()), **caches)


def _linux_caches() -> dict[str, int]:
    """l1d and l2_per_core of the first core; empty where the system does not tell."""
    found = {}
    for level, size, sharers in _cpu_caches(0):
        if level in (1, 2):
            found[("l1d", "l2_per_core")[level - 1]] = size // sharers
    return found


def _apple_caches() -> dict[str, int]:
    """The same of the fast cores, which share a second-level cache per cluster."""
    l1d, l2, sharers = (
        int(_sysctl(f"hw.perflevel0.{name}") or 0) for name in ("l1dcachesize", "l2cachesize", "cpusperl2")
    )
    return {name: size for name, size in (("l1d", l1d), ("l2_per_core", l2 // max(1, sharers))) if size}


def _cpu_caches(core: int) -> list[tuple[int, int, int]]:
    """(level, bytes, cores that share it) of a core's caches that hold data; empty where the system does not tell."""
    caches = []
    for path in sorted(_CPUS.glob(f"cpu{core}/cache/index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _text(path / "size"))
        if size and _text(path / "type") != "Instruction":
            bytes_ = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
            caches.append((int(_text(path / "level") or 0), bytes_, len(_listed(_text(path / "shared_cpu_list"))) or 1))
    return caches


def _fast_cores() -> int:
    """Cores of the largest capacity among those that this process may use; 0 where the system does not tell."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    intel = _listed(_text(_CPUS.parents[1] / "cpu_core" / "cpus"))  # of a hybrid processor the performance cores
    if intel:
        return sum(core in intel for core in usable)
    capacities = [int(_text(_CPUS / f"cpu{core}" / "cpu_capacity") or 0) for core in usable]
    return capacities.count(max(capacities)) if any(capacities) else 0


def _listed(text: str) -> set[int]:
    """The cores of a list such as "0-3,8"."""
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def _text(path: Path) -> str:
    """A small file's text, or "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else ""


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    run = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return run.stdout.strip()


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    name = _cpuinfo("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    # Virtual machines report a bare "Intel Xeon Processor" for many generations: the model number tells them apart.
    number = "-".join(filter(None, (_cpuinfo("cpu family"), _cpuinfo("model"))))
    return f"{canonical_name(name)} {number}".strip()


def _kernel_hash(device: str) -> str:
    """Digest of what runs: what the CPU kernels were built from, or the shaders and what plans and launches them."""
    if device == "cpu":
        return ops.cpu_digest()[:16]
    digest = hashlib.sha256(ops.plan_digest().encode())
    for path in sorted(p for p in ops.SHADERS.glob("*") if p.suffix in (".metal", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
