"""Where a checkpoint is: a directory of this machine, or a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mlx_lm.utils import _download

# What the Hub's client raises for a name that is none, a repository that does not exist or may not be read, and a
# network that is not there. A full disk is not among them.
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)

# What tells which model a checkpoint holds, without its weights: what mlx_lm.utils.sharded_load fetches first.
DESCRIPTION_FILES = [
    "*.json",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


# The revision that is meant where none is said, by repository.
_pinned: dict[str, str] = {}


def pin(repo: str, revision: str) -> None:
    """Mean a branch, tag or commit wherever a repository is fetched without one, for the rest of the process."""
    _pinned[repo] = revision


def fetch(path_or_hf_repo: str | Path, revision: str | None = None, allow_patterns: list[str] | None = None) -> Path:
    """The directory of a checkpoint; one of the Hub is downloaded as mlx-lm does it.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        revision: Branch, tag or commit of the repository. Default: ``None``, what :func:`pin` said, or its main
            branch.
        allow_patterns: Files to download. Default: ``None``, those that mlx-lm wants.

    Raises:
        FileNotFoundError: If it is neither, or a single file.
    """
    if Path(path_or_hf_repo).is_file():
        raise FileNotFoundError(f"{path_or_hf_repo} is a file; give the directory of the model, with config.json")
    revision = revision or _pinned.get(str(path_or_hf_repo))
    try:
        return Path(_download(str(path_or_hf_repo), revision=revision, allow_patterns=allow_patterns))
    except _HUB_ERRORS as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{path_or_hf_repo} is no directory here, and could not be had from the Hugging Face Hub{at}: {reason}"
        ) from error
