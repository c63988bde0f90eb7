"""The installed Metal sources, one self-contained text per kernel family."""

from __future__ import annotations

import re
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


def sources(directory: Path) -> dict[str, str]:
    """Source text by kernel family (the stem of its ``.metal`` file), includes replaced by what they include.

    Args:
        directory: Where the package has its sources installed.

    Raises:
        RuntimeError: If the sources are missing or not ASCII, which Metal's compiler interface needs.
    """
    texts = {}
    for path in sorted(directory.glob("*.[hm]*")):
        try:
            texts[path.name] = path.read_text(encoding="ascii")
        except UnicodeDecodeError as error:
            raise RuntimeError(f"{path} is not ASCII ({error}); reinstall mlx_marlin") from error
    stems = [name.removesuffix(".metal") for name in texts if name.endswith(".metal")]
    if not stems:
        raise RuntimeError(f"no Metal sources in {directory}; reinstall mlx_marlin")
    return {stem: flatten(f"{stem}.metal", texts) for stem in stems}


def flatten(name: str, texts: dict[str, str]) -> str:
    """A source with every quoted include replaced, the first time that it is met.

    Args:
        name: The source to begin with.
        texts: All sources by file name.

    Raises:
        RuntimeError: If an included file is missing.
    """
    seen = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        if name not in texts:
            raise RuntimeError(f"the Metal source {name} is missing; reinstall mlx_marlin")
        return _INCLUDE.sub(lambda match: expand(match[1]), texts[name].replace("#pragma once\n", ""))

    return expand(name)
