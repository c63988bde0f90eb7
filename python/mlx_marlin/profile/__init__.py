"""The tuned table of a machine: its schema, its file, and the one that the layers of this process select from."""

from .active import find, generation, predicted, prediction, refresh, tuned, use_profile
from .files import default_path, load, save
from .schema import AutotuneConfig, ProfileError

__all__ = [
    "AutotuneConfig",
    "ProfileError",
    "default_path",
    "find",
    "generation",
    "load",
    "predicted",
    "prediction",
    "refresh",
    "save",
    "tuned",
    "use_profile",
]
