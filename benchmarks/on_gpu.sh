#!/usr/bin/env bash
# What a release must show on a Hopper GPU: the GPU tests, compute-sanitizer over the shipped kernels, and every named
# workload against the peers that are importable. Results go to the folder $1; needs what `jagtile[test]` brings, and nvcc.
set -euo pipefail
out="$(mkdir -p "${1:?usage: benchmarks/on_gpu.sh FOLDER}" && cd "$1" && pwd)"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/.pkg${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"

"$python" -m jagtile.generator.cli doctor 2>&1 | tee "$out/doctor.log"
"$python" -m pytest -q -n "${JOBS:-8}" tests/gpu 2>&1 | tee "$out/tests.log" | tail -1
"$python" benchmarks/sanitize.py >"$out/sanitize.log" # builds the kernels, so that the sanitizer does not watch that
failed=0
for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no --kernel-name kns=jagtile \
        "$python" benchmarks/sanitize.py >"$out/$tool.log" 2>&1 || failed=1
    echo "$tool: $(tail -1 "$out/$tool.log")"
done
"$python" -m jagtile.generator.cli bench --skip flex --seconds 0.25 --max-samples 21 -o "$out/bench.json" 2>&1 |
    tee "$out/bench.log" | sed -n '/Time of each peer/,$p'
exit "$failed"
