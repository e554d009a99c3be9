"""For the tests of kernels on GPUs: the checks beside this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Tests run side by side: what one process has cached another can't have."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
