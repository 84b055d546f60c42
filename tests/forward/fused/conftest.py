"""Tiny models of the kinds that are computed in fused blocks, and a batch for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
Build = Callable[..., Any]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["llama", "llama_biases", "qwen2", "qwen3"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind in turn."""
    return str(request.param)


@pytest.fixture
def build() -> Build:
    """Makes a model of a kind."""
    return build_model


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """Makes prompts with so long a common beginning, and their completions."""
    return build_batch


def build_model(kind: str, **options: Any) -> Any:
    """A model with random weights, also in norms and biases."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "llama":
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **options))
    elif kind == "llama_biases":
        config = hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **options)
        model = hf.LlamaForCausalLM(config)
    elif kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, **options))
    else:
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=16, **options))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.train()


def build_batch(prefix: int = 12) -> Batch:
    """Five prompts `(5, 20)` with a common beginning, and completions of 9, 1, 4, 7, 9 tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(5, 20, dtype=torch.long)
    common = torch.randint(2, 64, (prefix,), generator=draw)
    mask = torch.zeros(5, 20, dtype=torch.bool)
    for row, length in enumerate((20, 17, 15, 20, 19)):
        own = torch.randint(2, 64, (length - prefix,), generator=draw)
        own[0] = 2 + row  # or two rows would have one more token in common
        ids[row, 20 - length :] = torch.cat([common, own])
        mask[row, 20 - length :] = True
    completion_ids = torch.randint(2, 64, (5, 9), generator=draw)
    completion_ids[0, 3] = ids[2, -1] = 0  # the padding token as a token, as chat templates use it
    completion_mask = torch.arange(9) < torch.tensor([9, 1, 4, 7, 9]).unsqueeze(1)
    return ids, mask, completion_ids, completion_mask
