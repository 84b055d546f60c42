"""Every causal language model of transformers is computed right, or refused in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import models_page
import pytest
import transformers
from model_sweep import sweep
from tiny_models import NOT_BUILT, every_name, tiny_model

# One of each kind; `make models` runs all.
FAST = [
    "llama", "qwen3_moe", "mistral", "gemma3_text", "bloom", "lfm2", "mamba", "qwen3_next",
    "bart", "openai-gpt", "llama4_text", "deepseek_v3", "bert:encoder", "gpt_neo", "git",
]  # fmt: skip
RESULTS = os.environ.get("SDFT_MODELS", "")


@pytest.mark.parametrize("name", every_name() if RESULTS else FAST)
def test_right_by_every_path_or_refused(name: str, tokenizer: Any, tmp_path: Path) -> None:
    if name in NOT_BUILT:
        with pytest.raises(Exception):  # noqa: B017, PT011 - each has its own reason
            tiny_model(name)
        return
    verdict = sweep(name, tokenizer, tmp_path / "model")
    if RESULTS:
        path = Path(RESULTS) / f"{name.replace(':', '+')}.json"
        path.write_text(json.dumps(verdict.as_dict()), encoding="utf-8")
        return
    # The page says of this architecture what was found, if it was made with this version.
    page = models_page.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}." in page:
        assert models_page.row(verdict) in page, "docs/models.md is old: `make models` writes it"
