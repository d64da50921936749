#!/usr/bin/env bash
# The one gate: format, lint, types, tests. `--slow` runs the slow tests too, and on a GPU those that need one;
# other words go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

selection="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then
    selection=""
    shift
fi

ruff format --check .
ruff check .
mypy
python -m pytest -m "$selection" "$@"
