"""The stream of the student's weights: what is on the Hub, parameter by parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import merged_copy
from sdft_lightning.rollout.vllm import weights as weights_file
from sdft_lightning.rollout.vllm.weights import (
    Form,
    WeightsFolder,
    weights_index,
    weights_stream,
    write_weights,
)

WHOLE = Form(torch.float32)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
LATENT = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"tie_word_embeddings": True}),
        ("Qwen3MoeConfig", EXPERTS),  # fused experts, which the Hub has one by one
        ("DeepseekV3Config", LATENT),  # a buffer that belongs to the weights
    ],
)
def test_names_and_tensors_are_those_that_transformers_saves(
    kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **more))
    model.save_pretrained(tmp_path)
    expected, stream = saved(tmp_path), dict(weights_stream(model, WHOLE))
    assert sorted(stream) == sorted(expected)
    assert all(torch.equal(stream[name], tensor) for name, tensor in expected.items())
    index = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in stream.items()]
    assert [tuple(entry) for entry in weights_index(model, WHOLE)] == index
    assert all(tensor.is_contiguous() for tensor in stream.values())


def test_every_tensor_is_cast_and_read_when_it_is_asked_for(model: Any) -> None:
    stream = weights_stream(model, Form(torch.bfloat16))
    first, _ = next(stream)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    rest = dict(stream)
    assert first not in rest
    assert {tensor.dtype for tensor in rest.values()} == {torch.bfloat16}
    assert all(bool((tensor == 3.0).all()) for tensor in rest.values())


def test_adapters_are_merged_or_left_out(make_adapted: Any, model: Any) -> None:
    student = make_adapted()
    merged = dict(merged_copy(student).named_parameters())
    stream = dict(weights_stream(student, WHOLE))
    assert sorted(stream) == sorted(merged)
    assert all(torch.equal(stream[name], merged[name]) for name in merged)
    base = dict(weights_stream(student, Form(torch.float32, merge=False)))
    assert all(
        torch.equal(base[name], tensor)
        for name, tensor in model.state_dict().items()
        if name in base
    )
    assert sorted(base) == sorted(stream)
    assert not all(torch.equal(base[name], merged[name]) for name in merged)


def test_tied_head_is_a_tensor_of_its_own_where_that_is_asked_for(
    model: Any, tmp_path: Path
) -> None:
    assert "lm_head.weight" not in dict(weights_stream(model, WHOLE))
    form = Form(torch.float32, own_head=True)
    stream = dict(weights_stream(model, form))
    assert torch.equal(stream["lm_head.weight"], stream["model.embed_tokens.weight"])
    write_weights(model, tmp_path, form)
    assert sorted(saved(tmp_path)) == sorted(stream)


def test_large_weights_are_written_to_several_files_that_transformers_reads(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_file, "_FILE_BYTES", 20_000)
    write_weights(model, tmp_path, WHOLE)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def stream_from_shards(rank: int, meeting: str, parent: str) -> None:
    """One of two processes with half of a model each; leaves what they wrote together."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from sdft_lightning.models.sharding import shard_

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    student = LlamaForCausalLM(LlamaConfig(**SIZES))
    whole = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    shard_(student, init_device_mesh("cpu", (2,)))
    weights = WeightsFolder(parent)
    folder = weights.write(student, WHOLE)
    written = saved(folder)
    same = all(torch.equal(written[name], tensor) for name, tensor in whole.items())
    config = LlamaConfig.from_pretrained(folder)
    Path(f"{parent}/told-{rank}").write_text(f"{same} {len(written)} {config.architectures}")
    dist.barrier()
    try:  # an error of rank zero alone: the others gather to the end and hear of it
        WeightsFolder(f"{parent}/absent").write(student, WHOLE)
    except UserError as error:
        Path(f"{parent}/error-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_shards_are_gathered_one_by_one_and_an_error_leaves_nobody_waiting(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meeting"), str(tmp_path))
    torch.multiprocessing.spawn(stream_from_shards, arguments, nprocs=2)
    for rank in range(2):
        assert (tmp_path / f"told-{rank}").read_text() == "True 21 ['LlamaForCausalLM']"
        assert "there is no folder" in (tmp_path / f"error-{rank}").read_text()
