#!/usr/bin/env bash
# Sets up (once) and runs the main job: tunes a small set of kernels on the GPU, or on the CPU where there is none, then
# encodes real text with them and compares with torch. Arguments go to the example, e.g. `--dtype bf16`.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${extras:-}"
. .ci/setup.sh
jagtile() { "$PYTHON" -m jagtile.generator.cli "$@"; }

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    jagtile tune fwd_bf16_d64 fwd_bf16_d128 --device cuda --budget 24,100s
else
    jagtile tune fwd_fp32_d64 --device cpu --regime short --regime medium --budget 10,90s
fi
"$PYTHON" examples/text_encoder.py "$@"
