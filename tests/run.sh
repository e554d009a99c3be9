#!/usr/bin/env bash
# Sets up (once) and runs the tests; arguments go to pytest, e.g. `bash tests/run.sh -k dispatch`.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${extras:-test}"
. .ci/setup.sh
# A folder of its own for what the tests build, kept so that the next run need not build it again.
export JAGTILE_CACHE_DIR="${JAGTILE_TEST_CACHE:-$PWD/build/test-cache}"
exec "$PYTHON" -m pytest --numprocesses auto -q "$@"
