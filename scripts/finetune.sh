#!/usr/bin/env bash
# Fine-tune every exported model of a run.
#
#   bash scripts/finetune.sh                                the newest run
#   bash scripts/finetune.sh runs/digits_resnet56 --epochs 40
#
# Typed again it skips what is done and resumes the rest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    run=$1
    shift
else
    newest=$(ls -td runs/*/export 2>/dev/null | head -n 1 || true)
    if [ -z "$newest" ]; then
        echo "error: runs/ holds no exported run yet; type bash scripts/search_export.sh first, or name a run folder" >&2
        exit 2
    fi
    run=$(dirname "$newest")
    echo "newest run: $run"
fi

python finetune.py "$run" "$@"
