#!/usr/bin/env bash
# Packs what benchmarks/gpu.sh needs on a machine without a network: bash benchmarks/pack.sh IMAGES WEIGHTS [PACKAGE ...]
# IMAGES is an archive (.tar.xz, .tar.gz, .tar) of an image folder with train/ and test/, WEIGHTS a file for ResNet-56.
# The PACKAGEs are on that machine already and stay out (torch, torchvision and what they need always do); PYTHON=3.12
# names its Python. Makes the folder travel/ anew, which git ignores.
set -euo pipefail
images=$(realpath "$1") weights=$(realpath "$2")
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
rm -rf travel
mkdir -p travel/wheels
install -m 644 "$images" travel/images.tar
install -m 644 "$weights" travel/weights.pt
packages=$(python - "$@" <<'PYTHON'
import re
import sys
from importlib import metadata
from pathlib import Path


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(name, seen):
    """The package and all that it needs, without extras."""
    name = normal(name)
    if name in seen:
        return
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    seen.add(name)
    for line in requirements:
        if "extra ==" not in line:
            needs(re.match(r"[\w.-]+", line)[0], seen)


there, wanted = set(map(normal, sys.argv[1:])), {"ruff", "mypy"}  # nothing is linted there
for name in ("torch", "torchvision"):
    needs(name, there)
wanted |= there
for line in Path("requirements.txt").read_text().splitlines():
    name = re.match(r"[\w.-]*", line.split("#")[0])[0]
    if name:
        needs(name, wanted)
print(*(f"{name}=={metadata.version(name)}" for name in sorted(wanted - there - {"ruff", "mypy"})))
PYTHON
)
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 39 35 34 31 28 27 24 17 12 5)
# shellcheck disable=SC2086
python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "${PYTHON:-3.12}" --implementation cp $platforms --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --dest travel/wheels $packages
du -sh travel
