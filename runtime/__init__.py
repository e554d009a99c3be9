"""The run time: what ``import jagtile`` offers. Importing it is light and changes nothing but names in registries."""

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
from jagtile.runtime.flash_impl import register as _register_flash_impl
from jagtile.runtime.flops import register as _register_flops
from jagtile.runtime.njt import sdpa
from jagtile.runtime.patch import disable, enable, enabled

_register_flash_impl()
_register_flops()

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
