#!/bin/sh
# Installs kvarn into .venv, with a build of torch that fits this machine.
#
#   sh install.sh        the engine, the server and the command line
#   sh install.sh dev    the same, the tests' needs, and the default model
#
# On Linux without an NVIDIA GPU, PyPI's own torch would bring gigabytes of CUDA packages. So pip is
# asked first what it would take; unless that is a CPU build already, PyTorch's CPU index is used.
set -eu
cd "$(dirname "$0")"
torch="torch==2.13.0"
python="${PYTHON:-python3}"

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check"

if ! .venv/bin/python -c "import torch" 2>/dev/null; then
    if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ]; then
        if $pip install --quiet --dry-run --no-deps --report - "$torch" | grep -q '"version": "[^"]*+cpu"'; then
            $pip install --quiet "$torch"
        else
            $pip install --quiet --index-url https://download.pytorch.org/whl/cpu "$torch"
        fi
    else
        $pip install --quiet "$torch"
    fi
fi

if [ "${1:-}" = dev ]; then
    $pip install --quiet -e ".[dev]"
    .venv/bin/kvarn pull smollm2-135m
else
    $pip install --quiet -e .
fi
