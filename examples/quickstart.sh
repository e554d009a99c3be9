#!/usr/bin/env bash
# Sets up (once) and runs the main job: tunes a small set of kernels on the GPU, or on the CPU where there is none that is
# served, then encodes real text with them and compares with torch. Arguments go to the example, e.g. `--dtype bf16`.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${extras:-}"
if command -v nvidia-smi >/dev/null && ! command -v nvcc >/dev/null && [[ ! -x /usr/local/cuda/bin/nvcc ]]; then
    extras="${extras:+$extras,}nvcc"
fi
. .ci/setup.sh
jagtile() { "$PYTHON" -m jagtile.generator.cli "$@"; }

device="$("$PYTHON" - <<'PY'
import torch

served = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
print("cuda" if served else "cpu")
PY
)"
if [[ "$device" == cuda ]]; then
    jagtile tune fwd_bf16_d64 fwd_bf16_d128 --device cuda --budget 24,100s
else
    jagtile tune fwd_fp32_d64 --device cpu --regime short --regime medium --budget 10,90s
fi
"$PYTHON" examples/text_encoder.py --device "$device" "$@"
