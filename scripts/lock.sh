#!/usr/bin/env bash
# Write requirements/tested.txt (what .venv has, with hashes) and requirements/min.txt (the oldest
# versions that pyproject.toml allows). uv resolves both; it goes into an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=.venv/bin/python
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq uv
# torch's build, and with it its CUDA packages, is scripts/setup.sh's choice.
"$python" -m pip freeze --exclude-editable | sed 's/+cpu$//' >"$work/installed.txt"

compile() {
  "$work/venv/bin/uv" pip compile pyproject.toml --quiet --extra dev --universal \
    --python-version 3.11 --no-annotate --no-header "$@"
}

# All that belongs to torch is left out: the first line of a package and the hashes below it.
without_torch() {
  awk '/^[^ ]/ { skip = /^(torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==/ } !skip'
}

# The comments that these files open with stay.
write() {
  grep '^#' "requirements/$1" >"$work/head.txt"
  cat "$work/head.txt" - >"$work/$1"
  mv "$work/$1" "requirements/$1"
}

compile --generate-hashes --constraint "$work/installed.txt" | without_torch | write tested.txt
compile --resolution lowest-direct | write min.txt
