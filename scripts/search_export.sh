#!/usr/bin/env bash
# Dense model -> search -> export.
#
#   bash scripts/search_export.sh                                  ResNet-56 on the built-in digits
#   bash scripts/search_export.sh cifar10                          the paper's experiment
#   bash scripts/search_export.sh configs/mine.yaml --episodes 300    any YAML file, any flag
#
# Typed again it skips what is done and resumes the rest.
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name=digits
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    name=$1
    shift
fi
if [ -f "configs/${name}_resnet56.yaml" ]; then
    config=configs/${name}_resnet56.yaml
elif [ -f "$name" ]; then
    config=$name
elif [ -f "$here/$name" ]; then
    config=$here/$name
else
    echo "error: there is no experiment $name; known are digits, cifar10, or the path of a YAML file (see configs/)" >&2
    exit 2
fi

for word in "$@"; do
    case $word in
        --epochs | --epochs=* | --ask | --ask=*)
            echo "error: ${word%%=*} belongs to one command; here use --pretrain_epochs or --finetune_epochs, or call that command" >&2
            exit 2
            ;;
    esac
done

python pretrain.py --config "$config" "$@"
python search.py --config "$config" "$@"
python export.py --config "$config" "$@"
