# Needs only make and a Python >= 3.11; everything else goes into .venv.
PYTHON_BIN := .venv/bin/python
STAMP := .venv/.stamp
# Finds names that are newer than the oldest Python that the package runs on. `long` is a name of
# ours, not Python 2's.
VERMIN := .venv/bin/vermin -q -t=3.11- --no-tips --violations --eval-annotations --exclude long

# Compiled modules are kept, as Python does by itself; see scripts/setup.sh.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup model test test-min test-vllm gpu soak models demo perf lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with all that is needed (first time 2-5 minutes, then nothing)

$(STAMP): pyproject.toml setup.py scripts/setup.sh requirements/tested.txt
	@bash scripts/setup.sh
	@touch $(STAMP)

model: $(STAMP) ## fetch and convert the embedded model into the cache (first time about 1 minute)
	$(PYTHON_BIN) -m sdft_lightning.models.embedded

test: model ## run all tests on the CPU (15 to 35 minutes)
	$(PYTHON_BIN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-min: ## run a few tests with the oldest packages allowed, in .venv-min (5 to 10 minutes)
	bash scripts/test_min.sh

test-vllm: model ## sample with vLLM in .venv-vllm: weight refresh, a server and its faults (10 to 20 minutes)
	bash scripts/test_vllm.sh

gpu: $(STAMP) ## try and measure on this machine's GPU, GPU="--out FILE" keeps it (at most 10 minutes)
	$(PYTHON_BIN) scripts/gpu_check.py $(GPU)

soak: $(STAMP) ## kill and resume runs and plans; 100,000 broken rows (10 minutes and more)
	$(PYTHON_BIN) scripts/soak.py
	$(PYTHON_BIN) scripts/fuzz_rows.py
	SDFT_SOAK=1 $(PYTHON_BIN) -m pytest -q tests/continual/test_kill.py

models: $(STAMP) ## compare every architecture of transformers with plain passes, write docs/models.md (4 minutes)
	rm -rf .models && mkdir .models
	SDFT_MODELS=$(CURDIR)/.models $(PYTHON_BIN) -m pytest -q -n 2 tests/models/sweep
	$(PYTHON_BIN) tests/models/sweep/models_page.py .models
	rm -rf .models

demo: model ## teach the embedded model facts on the CPU (18 to 25 minutes)
	$(PYTHON_BIN) -m sdft_lightning.cli.demo $(DEMO)

perf: model ## time our step, loss and sampling against TRL's and plain ones (one to two hours)
	$(PYTHON_BIN) -m pip freeze --exclude-editable > .venv/.installed # none of these may change
	$(PYTHON_BIN) -m pip install -qq --constraint .venv/.installed --editable ".[perf]"
	$(PYTHON_BIN) tests/perf/run.py $(PERF)

lint: $(STAMP) ## check style, format, types and the oldest Python (about 1 minute)
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	$(VERMIN) sdft_lightning tests scripts cli.py setup.py

clean: ## remove .venv, caches and builds; runs/ and the model cache stay (seconds)
	rm -rf .venv .venv-vllm .venv-min build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
