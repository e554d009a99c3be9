"""For the tests of CUDA kernels without a GPU: the emulator beside this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
