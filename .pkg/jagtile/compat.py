"""Other packages' functions, served by jagtile: ``from jagtile.compat import flash_attn_varlen_func``."""

from jagtile.runtime.compat import *  # noqa: F403
from jagtile.runtime.compat import __all__ as __all__
