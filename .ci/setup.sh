#!/usr/bin/env bash
# Sets PYTHON to an interpreter that has everything jagtile and the named extras need. To be sourced:
#
#     extras=test,dev
#     . .ci/setup.sh
#
# An interpreter that has it all ($PYTHON, else python3) is taken as it is; otherwise a virtual environment is made, once,
# in .venv (or $JAGTILE_VENV). A torch that the interpreter has is reused; else $TORCH is installed before all else: what
# pip would take by itself may be another release, with gigabytes of CUDA. pip's configuration (PIP_*, pip.conf) holds.

TORCH="${TORCH:-torch==2.13.0}"
extras="${extras:-}"
host_python="${PYTHON:-python3}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${JAGTILE_VENV:-$root/.venv}"
export PYTHONPATH="$root/.pkg${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "jagtile: $*" >&2
    exit 1
}

# Whether the interpreter $1 can import all dependencies and those of the extras.
has_everything() {
    local modules="torch numpy jinja2 ninja optuna click rich filelock platformdirs msgspec cuda.pathfinder"
    [[ ",$extras," == *,test,* ]] && modules+=" pytest xdist pytest_timeout hypothesis"
    [[ ",$extras," == *,dev,* ]] && modules+=" ruff mypy"
    [[ ",$extras," == *,fleet,* ]] && modules+=" psycopg"
    "$1" - $modules <<'PY' 2>/dev/null
import importlib.util
import sys

sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[1:]))
PY
}

# The folder of a torch that the interpreter $1 has and jagtile can use; nothing where there is none.
torch_folder() {
    "$1" - <<'PY' 2>/dev/null || true
import importlib.util
from importlib.metadata import version
from pathlib import Path

release = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
if release >= (2, 10):
    print(Path(importlib.util.find_spec("torch").origin).parent.parent)
PY
}

make_venv() {
    local torch_at
    [[ -x "$venv/bin/python" ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    "$host_python" -m venv "$venv" || "$host_python" -m virtualenv "$venv" ||
        fail "$host_python can't make a virtual environment; Debian and Ubuntu: apt-get install python3-venv"
    torch_at="$(torch_folder "$host_python")"
    if [[ -n "$torch_at" ]]; then
        echo "$torch_at" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_reused.pth"
    fi
}

command -v "$host_python" >/dev/null || fail "no $host_python; install Python 3.10 or later, or set PYTHON"
"$host_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$host_python" --version) is too old; jagtile needs 3.10 or later (set PYTHON to one)"
compiler="${CXX:-g++}"
command -v "${compiler%% *}" >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++ compiler, which the CPU kernels need; Debian and Ubuntu: apt-get install g++ (or set CXX)"

if has_everything "$host_python"; then
    PYTHON="$host_python"
else
    PYTHON="$venv/bin/python"
    if ! { [[ -x "$PYTHON" ]] && has_everything "$PYTHON"; }; then
        make_venv
        "$PYTHON" -c 'import torch' 2>/dev/null || "$PYTHON" -m pip install -qq "$TORCH"
        "$PYTHON" -m pip install -qq --editable "$root${extras:+[$extras]}"
    fi
fi
export PYTHON
