"""One tuner of the fleet test: ``jagtile tune`` with workloads cut to next to nothing. argv: the command's arguments.

With HANG_AT=FILE it stops for good in the middle of its first batch, once that file exists to tell so.
"""

import os
import sys
import time
from pathlib import Path

from jagtile.generator import tune_session, workloads
from jagtile.generator.measure import Plan
from jagtile.generator.trial import TrialRunner

workloads._CPU_SIZES = dict.fromkeys(workloads._CPU_SIZES, 2)
workloads.checks = lambda spec: ()
tune_session._PLANS = dict.fromkeys(tune_session._PLANS, Plan(rounds=3, sample_ms=1))
tune_session._BATCH = {"cpu": 2}


def hang(self, job, configs, control):
    Path(os.environ["HANG_AT"]).write_text(" ".join(config.name for config in configs))
    time.sleep(1000)


if __name__ == "__main__":
    from jagtile.generator.cli import cli

    if "HANG_AT" in os.environ:
        TrialRunner.run = hang
    cli.main(sys.argv[1:], prog_name="jagtile")
