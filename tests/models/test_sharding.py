"""Models spread over two processes: gradients, unequal prompts, whole copies, the teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.layout import can_share
from sdft_lightning.forward.policy import Policy
from sdft_lightning.models.sharding import (
    data_parallel_mesh,
    empty_copy,
    gathered,
    is_sharded,
    shard_,
)
from sdft_lightning.teacher import FrozenTeacher

# Each process takes its own row; both compare what is sharded with a plain model on both rows.
WORKER = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from sdft_lightning.losses.bounded import bounded_cross_entropy
from sdft_lightning.forward.hidden import completion_hidden_states, output_head
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.models.sharding import shard_
from sdft_lightning.teacher import EMATeacher
from sdft_lightning.types import Tokens

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
tied, checkpointed = sys.argv[1] == "tied", sys.argv[2] == "checkpointed"
config = LlamaConfig(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    initializer_range=0.3,
)
torch.manual_seed(0)
plain = LlamaForCausalLM(config).train()
model = copy.deepcopy(plain)
if checkpointed:
    model.gradient_checkpointing_enable()
teacher = EMATeacher(0.25)
teacher.copy_from(model)
average = copy.deepcopy(teacher.network)
weights = StudentPasses("same")
weights.prepare(model)
shard_(model, mesh)
teacher.shard_(mesh)

def loss(model, rows):
    # The prompts of rank 0 share nine tokens, those of rank 1 nothing.
    prompts = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10 + i] if row == 0 else
                            [i + 1 + j for j in range(10)] for row in rows for i in (0, 5)])
    answers = torch.tensor([[row + 3, 4 * row + 7, 40] for row in rows for _ in (0, 5)])
    mask = torch.ones_like(answers, dtype=torch.bool)
    hidden = completion_hidden_states(
        model, Tokens(prompts, torch.ones_like(prompts).bool()), Tokens(answers, mask), mask)
    weight = torch.full((mask.sum(),), 1 / mask.sum())
    return bounded_cross_entropy(hidden, output_head(model), answers[mask], weight)[0]

def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

mine, theirs = optimizer(model), optimizer(plain)
for step in (1, 2):
    mine.zero_grad(), theirs.zero_grad()
    loss(model, [rank]).backward()
    loss(plain, [0, 1]).backward()
    grads = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad.full_tensor(), grads[name].grad, msg=lambda m: f"{name}: {m}")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    mine.step(), theirs.step()
    teacher.update_(model, step)
    for a, b in zip(average.parameters(), plain.parameters(), strict=True):
        a.data.lerp_(b.data, 0.25)
    whole = weights.at(model, step).sampler()
    for a, b in zip(whole.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(teacher.network.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)
    apart = sum((a - b).square().sum() for a, b in zip(average.parameters(), plain.parameters()))
    distance = (apart / sum(p.square().sum() for p in plain.parameters())).sqrt()
    torch.testing.assert_close(teacher.distance(model), float(distance), rtol=1e-4, atol=1e-7)
assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tied
local = sum(p.to_local().numel() for p in model.parameters())
assert local <= 0.55 * sum(p.numel() for p in plain.parameters()), local
"""


def run_two(folder: Path, port: int, *arguments: str) -> None:
    script = folder / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**base, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-4000:]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("activations", ["kept", "checkpointed"])
def test_gradients_of_unequal_prompts_are_the_mean_over_ranks_and_the_teacher_follows(
    tmp_path: Path, free_port: int, head: str, activations: str
) -> None:
    run_two(tmp_path, free_port, head, activations)


def test_a_plain_model_is_left_as_it_is(model: Any) -> None:
    weight = model.lm_head.weight
    assert gathered(weight) is weight
    assert not is_sharded(model)
    assert can_share(model)


def test_an_empty_copy_takes_no_memory_and_leaves_the_model_alone(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = empty_copy(model)
    assert sum(p.numel() for p in copied.parameters()) == 0
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert torch.equal(copied.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Mesh(dict[str, Any]):
    """Two dimensions with their sizes, as Lightning's device mesh names them."""

    class Part:
        def __init__(self, size: int) -> None:
            self.size = lambda: size

    def __init__(self, data: int, tensor: int) -> None:
        super().__init__(data_parallel=self.Part(data), tensor_parallel=self.Part(tensor))


def test_tensor_parallelism_is_refused() -> None:
    mesh = Mesh(2, 1)
    assert data_parallel_mesh(mesh) is mesh["data_parallel"]
    with pytest.raises(UserError, match=r"tensor_parallel_size is 2, allowed is 1.*fsdp2"):
        data_parallel_mesh(Mesh(1, 2))


def test_a_model_without_named_blocks_is_refused(model: Any) -> None:
    model._no_split_modules = None
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*_no_split_modules.*Use ddp"):
        shard_(model, None)


def test_cached_prompts_are_refused_before_anything_is_cut(model: Any) -> None:
    teacher = FrozenTeacher(cache_prompts=True)
    teacher.copy_from(model)
    with pytest.raises(UserError, match=r"teacher.cache_prompts: got true.*false"):
        teacher.shard_(None)
    assert not is_sharded(teacher)


def test_adapters_are_refused_before_anything_is_cut(fit_module: Any) -> None:
    from sdft_lightning.models.lora import LoRA

    module = fit_module(model={"policy": {"lora": LoRA(r=2)}})
    with pytest.raises(UserError, match=r"model\.policy.lora: adapters under fsdp2"):
        module.shard_models(None)


def test_what_cannot_take_shards_is_refused_before_a_model_is_loaded() -> None:
    from types import SimpleNamespace

    from sdft_lightning.models.lora import LoRA
    from sdft_lightning.models.low_memory import LowMemoryAdamW
    from sdft_lightning.modules import SDFTModule
    from sdft_lightning.rollout import TransformersEngine, VLLMEngine

    module = SDFTModule(policy=Policy("no/such/model"), optimizer=LowMemoryAdamW)
    module._device_mesh = Mesh(2, 1)  # type: ignore[assignment]
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    expected = r"model\.optimizer: got LowMemoryAdamW.*fsdp2.*torch\.optim\.AdamW.*strategy=ddp"
    with pytest.raises(UserError, match=expected):
        module.configure_model()
    module.optimizer_factory = torch.optim.AdamW
    module.rollouts.engine = VLLMEngine()
    with pytest.raises(UserError, match=r"model\.engine: under fsdp2.*strategy=ddp"):
        module.configure_model()
    module.policy = Policy("no/such/model", lora=LoRA(r=2))
    with pytest.raises(UserError, match=r"model\.policy.lora: adapters under fsdp2"):
        module.configure_model()
    module.policy, module.rollouts.engine = Policy("no/such/model"), TransformersEngine()
    with pytest.raises(UserError, match=r"model\.policy\.name: there is no folder no/such/model"):
        module.configure_model()
