#!/usr/bin/env bash
# Make .venv-min, an environment with the oldest packages that pyproject.toml allows, and run a small
# selection of tests in it: losses, rows, prompts, a training step, a whole fit of the command line.
# `make test-min` calls it. Choose the interpreter with PYTHON=/path/to/python (3.11).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-min
python=$venv/bin/python
stamp=$venv/.stamp

say() { printf '[test-min] %s\n' "$*"; }
install() { "$python" -m pip install -qq --no-compile "$@"; }

if [ ! -e "$stamp" ] || [ requirements/min.txt -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  say "making $venv (some minutes)"
  "${PYTHON:-python3.11}" -m venv --clear "$venv"
  install --upgrade pip
  torch=$(grep '^torch==' requirements/min.txt)
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    install --retries 1 "$torch" --index-url https://download.pytorch.org/whl/cpu || install "$torch"
  else
    install "$torch"
  fi
  # torchao (extra low-memory) needs a newer torch: beside 2.6 its import fails, and transformers
  # imports it where it is there.
  grep -v '^torch==\|^torchao==' requirements/min.txt >"$venv/others.txt"
  install --no-deps --requirement "$venv/others.txt"
  touch "$stamp"
fi
# The package is imported from here.
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m pytest -q -m "not slow and not embedded" tests/losses/test_divergence.py \
  tests/losses/test_bounded.py tests/data/test_rows.py tests/data/test_prompts.py \
  tests/modules/test_sdft.py tests/cli/test_cli.py tests/test_private_names.py "$@"
