"""VLLMEngine with a vLLM that only takes down what it is told; the real one is in tests/vllm."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sdft_lightning.errors import UserError
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMEngine
from sdft_lightning.rollout.engine import Sampled, as_rollout
from sdft_lightning.rollout.sampling import row_seeds
from sdft_lightning.rollout.vllm.weights import WeightsFolder
from sdft_lightning.types import Tokens


class FakeLLM:
    """Reads the folders that it is given at once, as vLLM does."""

    made: Any = None
    resets = True

    def __init__(self, **options: Any) -> None:
        FakeLLM.made = self
        self.options = options
        self.loaded = [read(options["model"])]
        self.calls: list[str] = []
        self.asked: list[tuple[Any, Any]] = []

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        self.loaded.append(read(kwargs["weights_path"]))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.resets

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, params))
        outputs = []
        for place in range(len(prompts)):
            ids = [7] * (place + 1) + ([2] if place % 2 else [])
            log_probs = [{i: SimpleNamespace(logprob=-0.5 * (t + 1))} for t, i in enumerate(ids)]
            reason = "stop" if place % 2 else "length"
            output = SimpleNamespace(token_ids=ids, logprobs=log_probs, finish_reason=reason)
            outputs.append(SimpleNamespace(outputs=[output]))
        return outputs


def read(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[VLLMEngine]:
    """An engine in whose place of vLLM the fake stands."""
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", module)
    # As the engine sets it for good, and only if it is not set.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    monkeypatch.setattr(FakeLLM, "resets", True)
    found = VLLMEngine(max_model_len=64, exchange_folder=str(tmp_path))
    yield found
    found.close()
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def request(step: int = 0, samples: int = 2) -> RolloutRequest:
    sampling = Sampling(5, 0.7, top_p=0.9, completions_per_prompt=samples)
    ids = torch.tensor([[0, 0, 5], [3, 4, 5]])  # (2, P), the first padded
    mask = torch.tensor([[False, False, True], [True, True, True]])  # (2, P)
    return RolloutRequest(Tokens(ids, mask), ["a", "b"], sampling, 1, step, [2, 9], 0)


def generate(engine: VLLMEngine, model: Any, step: int = 0) -> Any:
    return engine.generate(StudentPasses("same").at(model, 0), request(step))


def test_every_completion_is_asked_for_by_token_ids_with_its_own_seed(
    engine: VLLMEngine, model: Any
) -> None:
    generate(engine, model)
    ((prompts, params),) = FakeLLM.made.asked
    assert [each["prompt_token_ids"] for each in prompts] == [[5], [5], [3, 4, 5], [3, 4, 5]]
    assert [each["seed"] for each in params] == row_seeds(1, 0, ["a", "b"], 2)
    assert len({each["seed"] for each in params}) == 4
    rest = {name: value for name, value in params[0].items() if name != "seed"}
    assert rest == {
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 5,
        "stop_token_ids": [2, 9],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    assert FakeLLM.made.options["logprobs_mode"] == "processed_logprobs"
    assert FakeLLM.made.options["trust_remote_code"] is False
    assert FakeLLM.made.options["max_model_len"] == 64


def test_answers_become_a_padded_rollout_with_the_stop_token_inside(
    engine: VLLMEngine, model: Any
) -> None:
    rollout = generate(engine, model)
    assert rollout.completion_ids.tolist() == [
        [7, 0, 0, 0, 0],
        [7, 7, 2, 0, 0],
        [7, 7, 7, 0, 0],
        [7, 7, 7, 7, 2],
    ]
    assert rollout.completion_mask.sum(dim=1).tolist() == [1, 3, 3, 5]
    assert rollout.sampled_log_probs[1].tolist() == [-0.5, -1.0, -1.5, 0.0, 0.0]
    assert rollout.truncated.tolist() == [True, False, True, False]


def test_rows_with_a_length_of_their_own_are_asked_for_with_it(
    engine: VLLMEngine, model: Any
) -> None:
    first = request(samples=1)
    longer = first._replace(sampling=replace(first.sampling, max_new_tokens=9))
    engine.sample(StudentPasses("same").at(model, 0), [first, longer])
    ((_, params),) = FakeLLM.made.asked
    assert [each["max_tokens"] for each in params] == [5, 5, 9, 9]


def test_weights_are_refreshed_once_a_step_and_the_prefix_cache_with_them(
    engine: VLLMEngine, model: Any
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    parameter = model.get_parameter(name)
    values = []
    for step in (0, 0, 1, 2):
        generate(engine, model, step)
        values.append(parameter.detach().clone().bfloat16())
        parameter.data += 1.0
    llm = FakeLLM.made
    assert llm.calls == ["reload_weights", "reset_prefix_cache"] * 2
    for loaded, expected in zip(llm.loaded, [values[0], values[2], values[3]], strict=True):
        assert torch.equal(loaded[name], expected)
        assert loaded[name].dtype == torch.bfloat16


def test_same_step_after_a_checkpoint_was_loaded_is_refreshed_again(
    engine: VLLMEngine, model: Any
) -> None:
    generate(engine, model)
    engine.forget()
    generate(engine, model)
    assert FakeLLM.made.calls == ["reload_weights", "reset_prefix_cache"]


def test_old_keys_and_values_that_stay_are_an_error(
    engine: VLLMEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(engine, model)
    monkeypatch.setattr(FakeLLM, "resets", False)
    with pytest.raises(RuntimeError, match="kept keys and values"):
        generate(engine, model, 1)


def test_tied_head_is_untied_on_a_cpu_where_vllm_would_keep_the_old_one(
    engine: VLLMEngine, model: Any
) -> None:
    generate(engine, model)
    assert FakeLLM.made.options["hf_overrides"] == {"tie_word_embeddings": False}
    loaded = FakeLLM.made.loaded[0]
    assert torch.equal(loaded["lm_head.weight"], loaded["model.embed_tokens.weight"])


def test_adapters_arrive_merged_and_the_student_keeps_its_own(
    tmp_path: Path, make_adapted: Any
) -> None:
    student = make_adapted()
    ids = torch.tensor([[3, 4, 5]])
    expected = student(ids).logits  # (1, 3, V)
    weights = WeightsFolder(str(tmp_path), "float32")
    folder = weights.write(student, own_head=False)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name in read(str(folder)))
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)
    assert torch.equal(student(ids).logits, expected)


def test_only_the_newest_weights_stay_and_none_is_written_over(tmp_path: Path, model: Any) -> None:
    weights = WeightsFolder(str(tmp_path), "bfloat16")
    first = weights.write(model, own_head=False)
    second = weights.write(model, own_head=False)
    assert first != second
    assert list(second.parent.iterdir()) == [second]


def test_weights_do_not_outlive_an_engine_that_nobody_closed(tmp_path: Path, model: Any) -> None:
    weights = WeightsFolder(str(tmp_path), "bfloat16")
    weights.write(model, own_head=False)
    assert len(list(tmp_path.iterdir())) == 1
    del weights
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def write_in_a_group(rank: int, meeting: str, parent: str) -> None:
    """One of two processes that ask for the weights; each leaves what it was told."""
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    weights = WeightsFolder(parent, "float32")
    folder = weights.write(LlamaForCausalLM(config), own_head=False)
    Path(f"{parent}/told-{rank}").write_text(f"{folder} {len(read(str(folder)))}")
    dist.barrier()  # rank zero removes it when it ends
    try:
        WeightsFolder(f"{parent}/absent", "float32").write(LlamaForCausalLM(config), False)
    except UserError as error:
        Path(f"{parent}/error-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_all_processes_get_the_folder_that_rank_zero_wrote_or_its_error(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meeting"), str(tmp_path))
    torch.multiprocessing.spawn(write_in_a_group, arguments, nprocs=2)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert int(told[0].split()[1]) > 5  # tensors, and not an empty folder
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "there is no folder" in errors[0]


def test_missing_exchange_folder_is_named(tmp_path: Path, model: Any) -> None:
    with pytest.raises(UserError, match=r"exchange_folder: there is no folder .*absent"):
        WeightsFolder(str(tmp_path / "absent"), "bfloat16").write(model, own_head=False)


def test_completion_that_ended_on_another_token_is_refused() -> None:
    rows = [Sampled([7, 11], [-1.0, -1.0], finished=True)] * 4
    with pytest.raises(UserError, match="token 11, which does not end the student's"):
        as_rollout(rows, request(), 100, "vLLM")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"token_ids": [7, 999], "logprobs": [{7: -1.0}, {999: -1.0}]}, "the token id 999"),
        ({"token_ids": [7], "logprobs": [{7: math.nan}]}, "nan as the log-probability"),
        ({"token_ids": [7], "logprobs": None}, "without their log-probabilities"),
        ({"token_ids": [7], "logprobs": [{8: -1.0}]}, "without their log-probabilities"),
        ({"token_ids": [7] * 6, "logprobs": [{7: -1.0}] * 6}, "6 tokens, where at most 5"),
        ({"finish_reason": "abort"}, "for the reason 'abort'"),
    ],
    ids=str,
)
def test_what_the_own_vllm_gives_is_checked_as_a_servers(
    change: dict[str, Any],
    told: str,
    engine: VLLMEngine,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = FakeLLM.generate

    def odd(llm: FakeLLM, *arguments: Any, **options: Any) -> list[Any]:
        outputs = usual(llm, *arguments, **options)
        output = outputs[0].outputs[0]
        if change.get("logprobs"):
            every = [
                {token: SimpleNamespace(logprob=value) for token, value in each.items()}
                for each in change["logprobs"]
            ]
            output.__dict__.update(change, logprobs=every)
        else:
            output.__dict__.update(change)
        return outputs

    monkeypatch.setattr(FakeLLM, "generate", odd)
    with pytest.raises(UserError, match=f"the vLLM of this run .*{told}"):
        generate(engine, model)


def test_fewer_completions_than_asked_for_are_refused(
    engine: VLLMEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = FakeLLM.generate
    monkeypatch.setattr(FakeLLM, "generate", lambda *a, **options: usual(*a, **options)[1:])
    with pytest.raises(UserError, match="sent 3 completions, asked for were 4"):
        generate(engine, model)


def test_memory_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"gpu_memory_utilization: got 1\.5"):
        VLLMEngine(gpu_memory_utilization=1.5)
