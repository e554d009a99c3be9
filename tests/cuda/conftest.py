"""For the tests of CUDA kernels without a GPU: the emulator beside this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from emulator import schedules


@pytest.fixture(autouse=True)
def own_schedules(request: pytest.FixtureRequest) -> None:
    """A test finds the same whichever worker runs it, and after which others."""
    schedules.begin(request.node.name)
