"""The versions that must match, checked at import.

The extension subclasses MLX's C++ classes and shares ``mx.array`` through nanobind: both sides must come from one
exact mlx version and one generation of nanobind.
"""

from importlib import metadata

import mlx.core as mx

VERSION: str = metadata.version("mlx_marlin")
# pyproject.toml pins the same version for the build and at run time; tests/project/test_build.py compares them.
BUILT_FOR_MLX = "0.32.4"

_installed: str = mx.__version__  # type: ignore[attr-defined]  # MLX's stub leaves it out
if _installed != BUILT_FOR_MLX:
    raise ImportError(
        f"mlx_marlin {VERSION} is built for mlx {BUILT_FOR_MLX}, but mlx {_installed} is installed, whose C++ "
        f"interface may differ. Run: pip install mlx=={BUILT_FOR_MLX}"
    )

try:
    from . import _ext
except ImportError as error:
    raise ImportError(
        f"the C++ extension of mlx_marlin {VERSION} could not be loaded: {error}. It needs mlx {BUILT_FOR_MLX} "
        "(and on Linux mlx-cpu of the same version); rebuild it in a clone with: pip install --force-reinstall ."
    ) from error

try:
    _ext.abi_probe(mx.array(0))
except TypeError as error:
    raise ImportError(
        "mlx_marlin and mlx do not share the type mx.array: they were built with different generations of nanobind. "
        f"mlx {BUILT_FOR_MLX} needs nanobind 3.x (pinned in pyproject.toml); rebuild with: pip install --no-cache-dir ."
    ) from error
