"""The run time: what ``import jagtile`` offers. Importing it is light and changes nothing."""

from jagtile.runtime.api import varlen_attention, warmup
from jagtile.runtime.errors import (
    BuildError,
    CompilerNotFoundError,
    JagtileError,
    JagtileWarning,
    NoKernelError,
    UnsupportedError,
)
from jagtile.runtime.explain import explain
from jagtile.runtime.njt import sdpa
from jagtile.runtime.patch import disable, enable, enabled

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "CompilerNotFoundError",
    "JagtileError",
    "JagtileWarning",
    "NoKernelError",
    "UnsupportedError",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "explain",
    "sdpa",
    "varlen_attention",
    "warmup",
]
