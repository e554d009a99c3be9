#!/usr/bin/env bash
# Sets up (once) and runs the tests; arguments go to pytest, e.g. `bash tests/run.sh -k dispatch`.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${extras:-test}"
. .ci/setup.sh
# JAGTILE_TEST_SEED=TEXT gives tests that take torch's random numbers others than those of every run.
# Kernels that the tests build are kept, so that the next run need not build them again.
export JAGTILE_TEST_CACHE="${JAGTILE_TEST_CACHE:-$PWD/build/test-cache}"
exec "$PYTHON" -m pytest --numprocesses auto -q "$@"
