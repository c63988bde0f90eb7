"""Where profiles lie, whose they are, and how their files are read and written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs

from ..device.machine import fingerprint
from ..storage import atomic
from .json import decode, encode
from .schema import AutotuneConfig, ProfileError, merge

# A profile of a thousand problems with all candidates is about 20 MB.
MAX_FILE_BYTES = 256 << 20


def cache_dir() -> Path:
    """Where profiles lie: ``$MLX_MARLIN_CACHE_DIR``, else the user's cache directory."""
    override = os.environ.get("MLX_MARLIN_CACHE_DIR")
    return Path(override) if override else platformdirs.user_cache_path("mlx_marlin", appauthor=False)


def default_path(device: str) -> Path:
    """The profile of this machine for one device: one file per chip, cores, instruction set and build of the kernels.

    Args:
        device: ``"cpu"`` or ``"gpu"``.
    """
    return cache_dir() / "profiles" / f"{_stem(device)}-{fingerprint(device).kernel_hash[:8]}.json"


def latest_path(device: str) -> Path:
    """The newest profile of this machine, of whatever build of the kernels; :func:`default_path` if there is none."""
    mine = default_path(device)
    builds = [p for p in mine.parent.glob(f"{_stem(device)}-*.json") if re.fullmatch("[0-9a-f]{8}", p.stem[-8:])]
    return mine if mine.exists() or not builds else max(builds, key=lambda path: path.stat().st_mtime)


def _stem(device: str) -> str:
    f = fingerprint(device)
    parts = (f.device, f.chip, f"{f.cores}c" if f.cores else "", f.instruction_set)
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_").lower() for part in parts if part)


def foreign_machine(profile: AutotuneConfig, device: str) -> str | None:
    """Why a profile is not one of this machine's device, or ``None``."""
    here, there = fingerprint(device), profile.fingerprint
    if there is None:
        return f"it has no fingerprint, only the device name {profile.device_name!r}"
    if not there.same_machine(here):
        return f"it was measured on {there.chip} ({there.cores} cores), this is {here.chip} ({here.cores} cores)"
    return None


def foreign(profile: AutotuneConfig, device: str) -> str | None:
    """Why a profile does not hold timings of this machine and these kernels, or ``None``."""
    here, there = fingerprint(device), profile.fingerprint
    why = foreign_machine(profile, device)
    if why is None and there is not None and there.kernel_hash != here.kernel_hash:
        why = f"it was measured with kernels {there.kernel_hash}, these are {here.kernel_hash}"
    return why


def check_native(profile: AutotuneConfig, device: str, path: Path, *, any_build: bool = False) -> None:
    """Whether a profile holds timings of this machine and these kernels.

    Args:
        any_build: Whether other builds of the kernels will do. Default: ``False``.

    Raises:
        ProfileError: If not.
    """
    why = (foreign_machine if any_build else foreign)(profile, device)
    if why is not None:
        raise ProfileError(
            f"{path} is a foreign profile: {why}. Tune this machine with mlx_marlin-tune, "
            "or pass allow_foreign=True to use it all the same"
        )


def load(path: str | Path) -> AutotuneConfig:
    """Read a profile, every field checked.

    Raises:
        FileNotFoundError: If there is no such file.
        ProfileError: If the file is malformed; the message has the path of the bad field.
    """
    path = Path(path)
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB: not a profile")
    return decode(data, path)


def save(profile: AutotuneConfig, path: str | Path) -> AutotuneConfig:
    """Merge a profile into the file at ``path`` and write it whole, under a lock.

    Returns:
        The merged profile, as written.

    Raises:
        ProfileError: If the file there is malformed, or the profile of another machine or of other kernels.
    """
    from filelock import FileLock  # 10 ms that running a model does not need

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            on_disk = load(path)
            try:
                profile = merge(on_disk, profile)
            except ProfileError as error:
                raise ProfileError(f"{path} is not overwritten: {error}. Choose another output file") from None
        # What cannot be read back must not take the place of what can.
        settled = decode(encode(profile), f"the profile for {path}")
        if settled.problems.keys() != profile.problems.keys() or settled.lookup_table != profile.lookup_table:
            raise ProfileError(f"{path} is not overwritten: the new profile would not read back as it is")
        atomic.write_bytes(path, encode(settled))
    return settled
