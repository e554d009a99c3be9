"""Makes the fakes beside this file importable, here and in spawned processes, and the scripts that measure."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
