#!/usr/bin/env bash
# What a release must show on a Hopper GPU. Results go to the folder $1; further arguments name stages, without any all are
# run, in this order:
#   doctor    what is found
#   tests     the GPU tests
#   sanitize  compute-sanitizer's four tools over the shipped kernels
#   bench     every named workload against the peers that are importable, and the report of it and of what is on record
#   host      host time of a call, device time of building work lists, seconds of building a first call's kernel
#   random    random batches against the peers; borders of the regimes
#   tuner     the tuner's choices against exhaustive sweeps, for thirteen pairs of spec and regime
#   models    whole models, trained and used
# Needs what `jagtile[test]` brings, and nvcc. A stage that fails does not stop the others; the exit status tells.
set -euo pipefail
out="$(mkdir -p "${1:?usage: benchmarks/on_gpu.sh FOLDER [STAGE...]}" && cd "$1" && pwd)"
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/.pkg${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
limit="${LIMIT:-540}" # seconds a stage's program may take: a kernel that hangs must not hold the others up

within() { timeout --kill-after=10 "$limit" "$@"; }

doctor() { within "$python" -m jagtile.generator.cli doctor 2>&1 | tee "$out/doctor.log"; }

tests() {
    within "$python" -m pytest -q -n "${JOBS:-8}" -m gpu tests/gpu tests/tune 2>&1 | tee "$out/tests.log" | tail -20
}

sanitize() {
    local failed=0 tool
    within "$python" benchmarks/sanitize.py >"$out/sanitize.log" || return # builds, so that no tool watches that
    for tool in memcheck racecheck initcheck synccheck; do
        within compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no --kernel-name kns=jagtile \
            "$python" benchmarks/sanitize.py >"$out/$tool.log" 2>&1 || failed=1
        echo "$tool: $(tail -1 "$out/$tool.log")"
    done
    return "$failed"
}

bench() {
    local failed=0
    within "$python" -m jagtile.generator.cli bench --skip flex --seconds 0.25 --max-samples 21 -o "$out/bench.json" 2>&1 |
        tee "$out/bench.log" | sed -n '/Time of each peer/,$p' || failed=1
    within "$python" -m jagtile.generator.cli report "$out/bench.json" -o "$out/report.html" || failed=1
    return "$failed"
}

host() {
    local failed=0
    within "$python" benchmarks/host_cost.py cuda 2>&1 | tee "$out/host_cost.log" || failed=1
    within "$python" benchmarks/work_list.py 2>&1 | tee "$out/work_list.log" || failed=1
    within "$python" benchmarks/first_build.py 2>&1 | tee "$out/first_build.log" || failed=1
    return "$failed"
}

random() {
    local failed=0 dim
    within "$python" benchmarks/random_batches.py -o "$out/random.json" 2>&1 | tee "$out/random.log" || failed=1
    for dim in 64 128; do
        within "$python" benchmarks/borders.py --head-dim "$dim" -o "$out/borders-d$dim.svg" 2>&1 |
            tee "$out/borders-d$dim.log" || failed=1
    done
    return "$failed"
}

tuner() {
    local failed=0 spec
    for spec in fwd_bf16_d256 bwd_bf16_d128; do
        within "$python" benchmarks/tuner_quality.py "$out/$spec" "$spec" 2>&1 | tee "$out/tuner-$spec.log" || failed=1
    done
    return "$failed"
}

models() { # a part a program, all in one file; compiled training took about 330 s to start and check on an H100
    local failed=0 mode model task
    for mode in eager compiled; do
        for model in encoder decoder; do
            for task in inference training; do
                within "$python" benchmarks/models.py --modes "$mode" --models "$model" --tasks "$task" \
                    --patience "$((limit * 3 / 4))" --budget "$((limit / 12))" -o "$out/models.json" 2>&1 |
                    tee "$out/models-$model-$mode-$task.log" || failed=1
            done
        done
    done
    return "$failed"
}

all=(doctor tests sanitize bench host random tuner models)
failed=()
for stage in "${@:-${all[@]}}"; do
    [[ " ${all[*]} " == *" $stage "* ]] || { echo "no stage $stage; there are ${all[*]}" >&2; exit 2; }
    echo "== $stage"
    "$stage" || failed+=("$stage")
done
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}"; exit 1; }
