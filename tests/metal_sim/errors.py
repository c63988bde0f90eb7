"""What the simulator raises."""


class CompileError(Exception):
    """The source was rejected: by clang, by the lint, or at link time."""


class KernelError(Exception):
    """A run broke a rule; the message names kernel, threadgroup, thread and source line."""
