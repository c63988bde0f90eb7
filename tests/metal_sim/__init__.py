"""Compile Metal kernels on Linux and run them on the CPU with checks. See README.md."""

from .compiler import compile
from .errors import CompileError, KernelError
from .launch import Library, Out, Result
from .toolchain import unavailable

__all__ = ["CompileError", "KernelError", "Library", "Out", "Result", "compile", "unavailable"]
