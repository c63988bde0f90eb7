"""The machine: its names, its fingerprint, its caches, and how full its memory is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import mlx.core as mx

from .kernels import DEVICES, cpu_threads

# x86-64 instruction sets that the CPU kernels tell apart, best first, with the flags that each needs.
_X86_SETS = {"avx512": {"avx512f", "avx512bw", "avx512vl"}, "avx2": {"avx2", "fma", "f16c"}}
# Apple publishes no size for the system-level cache; 96 MB (M1 Ultra, M3 Ultra) is the largest that has been measured.
_APPLE_CACHE_BYTES = 96 << 20
# Where a machine does not tell: the largest last-level cache of current desktop processors.
_UNKNOWN_CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class Fingerprint:
    """What a timing depends on besides the problem and the config.

    Attributes:
        device: ``"cpu"`` or ``"gpu"``.
        chip: Device name: MLX's own for the GPU, the model for the CPU; without "Apple ".
        cores: CPU cores that this process may use; GPU cores where the system tells, else 0.
        instruction_set: Of the CPU; ``""`` for the GPU.
        os: System and release.
        mlx_version: MLX's version.
        kernel_hash: SHA-256 of the compiled kernels (CPU) or of the shader sources (GPU), shortened to 16 digits.
    """

    device: str
    chip: str
    cores: int
    instruction_set: str
    os: str
    mlx_version: str
    kernel_hash: str

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


def default_device() -> str:
    """``"gpu"`` where MLX's default device is one, else ``"cpu"``."""
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def canonical_name(name: str) -> str:
    """A device name without the maker's decorations: "Apple M4 Max" and "M4 Max" are the same."""
    name = re.sub(r"\((?:R|TM|C)\)", " ", name, flags=re.IGNORECASE)
    name = re.sub(r"\s@.*$|\bCPU\b|^\s*Apple\b", " ", name)
    return " ".join(name.split())


def device_family(name: str) -> str:
    """``"M1"`` to ``"M5"``, ``"CPU"`` or ``"Unknown"``, from a device name.

    A CPU's name ends in its instruction set in parentheses, as :func:`device_name` writes it.
    """
    if re.search(r"\((?:avx512|avx2|neon|baseline)\)$", name.strip()) or name.strip().casefold() == "cpu":
        return "CPU"
    match = re.match(r"(M[1-5])\b", canonical_name(name))
    return match[1] if match else "Unknown"


@cache
def device_name(device: str) -> str:
    """MLX's device name for the GPU ("M4 Max"); for the CPU model and instruction set ("Intel Xeon (avx512)")."""
    if check_device(device) == "cpu":
        return f"{_cpu_model()} ({instruction_set()})"
    if not mx.is_available(mx.Device(mx.gpu)):
        raise ValueError('this machine has no GPU that MLX can use; use device "cpu"')
    return canonical_name(mx.device_info(mx.gpu)["device_name"])


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """The best instruction set of this CPU that the kernels have code for: avx512, avx2, neon or baseline."""
    if platform.machine() in ("arm64", "aarch64"):
        return "neon"
    flags = set(_cpuinfo("flags").split())
    return next((name for name, needed in _X86_SETS.items() if needed <= flags), "baseline")


@cache
def fingerprint(device: str) -> Fingerprint:
    """The fingerprint of this machine for one of its devices.

    Args:
        device: ``"cpu"`` or ``"gpu"``.
    """
    gpu = check_device(device) == "gpu"
    return Fingerprint(
        device=device,
        chip=device_name("gpu") if gpu else _cpu_model(),
        cores=_gpu_cores() if gpu else cpu_threads(),
        instruction_set="" if gpu else instruction_set(),
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
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    if sizes:
        return max(sizes)
    return _APPLE_CACHE_BYTES if platform.system() == "Darwin" else _UNKNOWN_CACHE_BYTES


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", path.read_text(), re.MULTILINE)
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


@lru_cache(maxsize=1)
def _gpu_cores() -> int:
    if platform.system() != "Darwin":
        return 0
    run = subprocess.run(
        ["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d1", "-k", "gpu-core-count"],
        capture_output=True,
        text=True,
        check=False,
    )
    match = re.search(r'"gpu-core-count"\s*=\s*(\d+)', run.stdout)
    return int(match[1]) if match else 0


def _kernel_hash(device: str) -> str:
    """Digest of what runs: the shader sources that are compiled at run time, or the compiled extension."""
    package = Path(__file__).parent
    spec = importlib.util.find_spec("mlx_marlin._ext")
    files = [Path(spec.origin)] if spec is not None and spec.origin else []
    if device == "gpu":
        root = files[0].parent if files else package
        files = sorted(p for p in (root / "kernels").glob("*") if p.suffix in (".metal", ".h"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
