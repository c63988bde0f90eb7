"""The machine's names, fingerprint, cores and caches, here and on machines that are written down."""

import ast
import re
import shutil
from pathlib import Path

import pytest
from msgspec import structs

from mlx_marlin import device, kernels, ops
from mlx_marlin.device import machine


@pytest.mark.parametrize(
    "name, family",
    [
        ("M4 Max", "M4"),
        ("Apple M4 Max", "M4"),
        ("Apple M1", "M1"),
        ("M5", "M5"),
        ("M10", "Unknown"),
        ("M6", "Unknown"),
        ("CPU", "CPU"),
        ("Intel Xeon Processor 6-143 (avx512fp16)", "CPU"),
        ("Apple M4 (neonfp16)", "CPU"),
        ("Some processor (baseline)", "CPU"),
        ("Some processor (a_set_of_the_future)", "CPU"),
        ("RTX 4090", "Unknown"),
    ],
)
def test_device_family(name, family):
    assert device.device_family(name) == family


def test_this_cpu_has_a_name_and_a_family():
    name = device.device_name("cpu")
    assert name.endswith(f"({ops.instruction_set()})") and device.device_family(name) == "CPU"
    assert 0.0 <= device.memory_pressure("cpu") <= 1.0 and device.last_level_cache() > 0


def test_the_instruction_set_is_the_one_that_runs():
    from mlx_marlin import _ext

    assert device.fingerprint("cpu").instruction_set == ops.instruction_set() == _ext.instruction_set()


def test_no_module_lists_instruction_sets():
    """Their names come from the extension alone."""
    from mlx_marlin import _ext

    names = re.compile(r"\b(" + "|".join(set(_ext.compiled_instruction_sets()) - {"baseline"}) + r")\b")
    sources = Path(device.__file__).parents[1].rglob("*.py")
    strings = [n for p in sources for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Constant)]
    documented = {"The best instruction set", "MLX's device name"}  # examples in docstrings
    listed = [s.value for s in strings if isinstance(s.value, str) and names.search(s.value)]
    assert [text for text in listed if not text.strip().startswith(tuple(documented))] == []


def test_unknown_device():
    for ask in (device.device_name, device.hardware, device.fingerprint, device.memory_bytes):
        with pytest.raises(ValueError, match='device must be "cpu" or "gpu", got \'tpu\''):
            ask("tpu")


def test_the_kernel_hash_is_that_of_the_sources():
    """The extension's bytes differ from build to build; what it was built from does not."""
    here = device.fingerprint("cpu")
    assert re.fullmatch("[0-9a-f]{64}", ops.cpu_digest()) and here.kernel_hash == ops.cpu_digest()[:16]
    assert re.fullmatch("[0-9a-f]{64}", ops.plan_digest()) and ops.plan_digest() != ops.cpu_digest()
    assert machine._kernel_hash("gpu") not in ("", here.kernel_hash)


@pytest.mark.parametrize("changed", ["shader", "plan"])
def test_the_hash_of_the_gpu_is_that_of_shaders_and_plan(monkeypatch, tmp_path, changed):
    before = machine._kernel_hash("gpu")
    if changed == "plan":
        monkeypatch.setattr(ops, "plan_digest", lambda: "0" * 64)
    else:
        shutil.copytree(ops.SHADERS, tmp_path / "kernels")
        with open(tmp_path / "kernels" / "combine.metal", "a") as shader:
            shader.write("\n")
        monkeypatch.setattr(ops, "SHADERS", tmp_path / "kernels")
    assert machine._kernel_hash("gpu") != before


def test_another_build_is_the_same_machine():
    here = device.fingerprint("cpu")
    assert here.same_machine(structs.replace(here, kernel_hash="0", os="Linux 9", mlx_version="1"))
    assert not here.same_machine(structs.replace(here, cores=here.cores + 1))


# Machines that are written down


@pytest.fixture
def cpus(tmp_path, monkeypatch):
    """An empty /sys/devices/system/cpu."""
    folder = tmp_path / "devices" / "system" / "cpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(machine, "_CPUS", folder)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "cpu_threads", lambda: 8)
    machine.hardware.cache_clear()
    device.last_level_cache.cache_clear()
    yield folder
    machine.hardware.cache_clear()
    device.last_level_cache.cache_clear()


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"{text}\n")


def cache(cpus, index, level, kind, size, sharers):
    write(cpus / "cpu0" / "cache" / f"index{index}", level=level, type=kind, size=size, shared_cpu_list=sharers)


def test_caches_of_a_linux_machine(cpus):
    cache(cpus, 0, 1, "Data", "48K", "0,4")  # shared by the threads of a core
    cache(cpus, 1, 1, "Instruction", "64K", "0,4")
    cache(cpus, 2, 2, "Unified", "2M", "0-3")
    cache(cpus, 3, 3, "Unified", "30720K", "0-7")
    assert device.hardware("cpu") == kernels.Hardware(cores=8, fast_cores=8, l1d=24 << 10, l2_per_core=512 << 10)
    assert device.last_level_cache() == 30 << 20


def test_a_machine_that_does_not_tell(cpus):
    assert device.hardware("cpu") == kernels.Hardware(cores=8, fast_cores=8)
    assert device.last_level_cache() == machine._UNKNOWN_CACHE_BYTES


def test_fast_cores_of_an_arm_machine(cpus):
    for core in range(8):
        write(cpus / f"cpu{core}", cpu_capacity=1024 if core < 2 else 446)
    assert device.hardware("cpu").fast_cores == 2


def test_fast_cores_of_an_intel_machine(cpus):
    write(cpus.parents[1] / "cpu_core", cpus="0-5")
    assert device.hardware("cpu").fast_cores == 6


def test_an_apple_machine(cpus, monkeypatch):
    told = {"logicalcpu": "4", "l1dcachesize": "131072", "l2cachesize": "16777216", "cpusperl2": "4"}
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "_sysctl", lambda name: told[name.removeprefix("hw.perflevel0.")])
    assert device.hardware("cpu") == kernels.Hardware(cores=8, fast_cores=4, l1d=128 << 10, l2_per_core=4 << 20)
    monkeypatch.setattr(machine, "_sysctl", lambda name: "")  # a virtual machine
    machine.hardware.cache_clear()
    assert device.hardware("cpu") == kernels.Hardware(cores=8, fast_cores=8)


@pytest.mark.parametrize("name, l1", [("M1 Pro", 8192), ("M2", 8192), ("M3 Max", 0), ("M5", 0)])
def test_apple_gpus(cpus, monkeypatch, name, l1):
    monkeypatch.setattr(machine, "device_name", lambda on: name)
    monkeypatch.setattr(machine, "gpu_cores", lambda: 16)
    assert device.hardware("gpu") == kernels.Hardware(cores=16, gpu_l1=l1)
