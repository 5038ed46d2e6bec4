#!/bin/sh
# Gathers what a machine without network needs to run the GPU benchmarks and the tests of tests/gpu, in one folder.
#
#   benchmarks/gpu/wheels.sh FOLDER [PYTHON_VERSION [REQUIREMENT...]]
#
# Run it where there is a network; take FOLDER and this checkout along; there:
#
#   python -m venv --system-site-packages env && env/bin/python -m pip install --no-index --find-links FOLDER steploom
#   env/bin/python benchmarks/gpu --save
#
# Versions are those of constraints.txt, except torch and what comes with it: the machine has the build that fits its
# driver, as a rule, and the environment above sees it. To carry torch too, name it: wheels.sh FOLDER 3.12 torch==2.13.0
set -eu
folder=${1:?usage: wheels.sh FOLDER [PYTHON_VERSION [REQUIREMENT...]]}
version=${2:-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
[ $# -gt 2 ] && shift 2 || shift $#
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$folder"
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$root"
# Everything that steploom imports but torch, without following requirements, which would lead to torch again.
names='diffusers transformers accelerate greenlet anyio msgspec pyzmq uvloop numpy pillow rich huggingface-hub safetensors
  tokenizers regex idna sniffio typing-extensions packaging pyyaml filelock fsspec httpx httpcore h11 certifi requests
  urllib3 charset-normalizer tqdm psutil importlib-metadata zipp markdown-it-py mdurl pygments hf-xet typer click
  shellingham annotated-doc pytest pytest-asyncio pytest-timeout iniconfig pluggy'
tags='--platform manylinux2014_x86_64 --platform manylinux1_x86_64'
for glibc in 17 24 27 28 31 34 35; do tags="$tags --platform manylinux_2_${glibc}_x86_64"; done
pins=''
for name in $names; do
  pin=$(grep -i "^$(echo "$name" | sed 's/-/[-_]/g')==" "$root/constraints.txt") || { echo "not pinned, left out: $name" >&2; continue; }
  pins="$pins $pin"
done
# shellcheck disable=SC2086 # tags and pins are words
python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
  $tags -d "$folder" $pins "$@"
du -sh "$folder"
