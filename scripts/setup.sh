#!/usr/bin/env bash
# Make .venv and install this package into it, editable, with its development tools.
# `make setup` calls it. Choose the interpreter with PYTHON=/path/to/python. Installed are the tested
# versions (requirements/tested.txt, by their hashes); SDFT_REQUIREMENTS=latest takes the newest that
# pyproject.toml allows instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch_version=2.13.0 # the version that the tests run with
python=.venv/bin/python
# Many containers set it; then each start of Python would compile all that it imports anew, which
# took 20 of the 31 seconds that `sdft --help` needed on two slow cores.
unset PYTHONDONTWRITEBYTECODE

say() { printf '[setup] %s\n' "$*"; }
# -qq: errors only. --no-compile: of some 20,000 files a few thousand are ever imported, and Python
# compiles those then; to compile all takes some 50 s of processor time.
install() { "$python" -m pip install -qq --no-compile "$@"; }

# Of a Python with these modules that is new enough; pyproject.toml's requires-python says the same.
can() { "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }

find_python() {
  local candidate tried=${PYTHON:-python3.11 python3.12 python3.13 python3}
  for candidate in $tried; do
    # Tried out, not only looked up: pyenv leaves names that only print an error.
    if can "$candidate" "ensurepip, venv"; then
      echo "$candidate"
      return
    fi
  done
  say "no Python >= 3.11 with venv and ensurepip (tried: $tried); install one, or set" \
    "PYTHON=/path/to/python" >&2
  return 1
}

install_torch() {
  if "$python" -c 'import torch' >/dev/null 2>&1; then
    return
  fi
  if command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" != Linux ]; then
    say "installing torch $torch_version"
    install "torch==$torch_version"
  elif [[ $("$python" -m pip config list) == *find-links* ]]; then
    # Whoever set pip's find-links offers wheels of their own, a CPU build of torch perhaps.
    say "installing torch $torch_version as pip's find-links has it"
    install "torch==$torch_version"
  else
    # On Linux PyPI's torch brings gigabytes of CUDA, so PyTorch's own index of CPU builds first.
    say "no NVIDIA GPU: installing the CPU build of torch $torch_version"
    install --retries 1 "torch==$torch_version" \
      --index-url https://download.pytorch.org/whl/cpu ||
      install "torch==$torch_version"
  fi
}

install_package() {
  case ${SDFT_REQUIREMENTS:-tested} in
    tested)
      say "installing sdft-lightning[dev] with the versions of requirements/tested.txt"
      install --no-deps --require-hashes --requirement requirements/tested.txt
      install --no-deps --editable .
      ;;
    latest) install_latest ;;
    *)
      say "SDFT_REQUIREMENTS: got '$SDFT_REQUIREMENTS', allowed are tested (default) and latest" >&2
      return 1
      ;;
  esac
}

install_latest() {
  local constraint
  constraint=$(mktemp)
  # With the installed torch as a constraint, pip cannot trade it for a CUDA build.
  "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
    >"$constraint"
  say "installing sdft-lightning[dev] with $(cat "$constraint")"
  install --constraint "$constraint" --editable ".[dev]"
  rm -f "$constraint"
}

if ! can "$python" pip; then # also where an older Python has made it
  base=$(find_python)
  say "making .venv with $("$base" --version)"
  "$base" -m venv --clear .venv
fi
install --upgrade pip
install_torch
install_package
echo "${SDFT_REQUIREMENTS:-tested}" >.venv/.requirements
# What every command imports is compiled now, so that later starts find it whatever they may write.
"$python" -c 'import sdft_lightning.cli'
say "done in $SECONDS s; run .venv/bin/sdft --help, or make test"
