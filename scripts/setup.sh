#!/usr/bin/env bash
# Sourced by the other scripts: gives them `python` with all that requirements.txt names.
# An active virtual environment is used; otherwise .venv is made once. Nothing is installed twice.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    environment=$VIRTUAL_ENV
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    environment=$CONDA_PREFIX
else
    environment=$PWD/.venv
    if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one without pip
        base=
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                base=$candidate
                break
            fi
        done
        if [ -z "$base" ]; then
            echo "error: Python 3.10 or newer is needed and was not found; install it, or activate an environment that has it" >&2
            exit 2
        fi
        echo "making $environment with $($base --version)"
        if ! "$base" -m venv "$environment"; then
            echo "error: $base -m venv failed; on Debian and Ubuntu install the package python3-venv" >&2
            exit 2
        fi
    fi
fi
export PATH=$environment/bin:$PATH
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: Python 3.10 or newer is needed, but $environment has $(python --version); activate another environment, or none" >&2
    exit 2
fi

stamp=$environment/.requirements-of-cacp
if ! cmp -s requirements.txt "$stamp"; then
    echo "installing requirements.txt into $environment (about 5 GB with PyTorch; once)"
    if ! python -m pip install --quiet --disable-pip-version-check -r requirements.txt; then
        echo "error: pip could not install requirements.txt; check the network or the package index, then type the same command again" >&2
        exit 2
    fi
    cp requirements.txt "$stamp"
fi
