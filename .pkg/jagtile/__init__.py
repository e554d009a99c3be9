"""Attention kernels for jagged batches: generated, tuned, dispatched. The public names live in jagtile.runtime."""

from jagtile.runtime import *  # noqa: F403
from jagtile.runtime import __all__ as __all__
from jagtile.runtime import __version__ as __version__
