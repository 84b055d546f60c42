"""VLLMEngine with a vLLM that only takes down what it is told; the real one is in tests/vllm."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import LoRA, merged_copy
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMEngine
from sdft_lightning.rollout.engine import Sampled, as_rollout
from sdft_lightning.rollout.sampling import row_seeds
from sdft_lightning.rollout.vllm import engine as engine_file
from sdft_lightning.rollout.vllm.weights import Form, WeightsFolder
from sdft_lightning.types import Tokens


class FakeLLM:
    """Reads the folders that it is given at once, and streams to their end, as vLLM does.

    Attributes:
        loaded: Each version of the weights.
        adapters: Each version of the adapters.
        core: Whether it was started inside the trainer's process.
        used: What each call to sample named as adapters.
    """

    made: Any = None
    resets = True
    takes_adapters = True

    def __init__(self, **options: Any) -> None:
        FakeLLM.made = self
        self.options = options
        self.core = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.loaded = [] if options.get("load_format") == "dummy" else [read(options["model"])]
        self.adapters: list[dict[str, torch.Tensor]] = []
        self.calls: list[str] = []
        self.asked: list[tuple[Any, Any]] = []
        self.used: list[Any] = []
        shutdown = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=shutdown, add_lora=self.add_lora)
        torch.manual_seed(0)  # as vLLM seeds the process that it computes in

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        if "weights_iterator" in kwargs:
            assert self.core, "no iterator reaches another process"
            stream = {name: tensor.clone() for name, tensor in kwargs["weights_iterator"]}
            self.loaded.append(stream)
        else:
            self.loaded.append(read(kwargs["weights_path"]))

    def add_lora(self, request: Any) -> None:
        if not self.takes_adapters:
            raise ValueError("expected target modules in [q_proj]")
        assert request.load_inplace
        self.calls.append("add_lora")
        self.adapters.append(read(request.folder))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return self.resets

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def generate(
        self, prompts: Any, params: Any, use_tqdm: bool, lora_request: Any = None
    ) -> list[Any]:
        assert not torch.is_autocast_enabled("cpu")
        self.asked.append((prompts, params))
        self.used.append(lora_request)
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
def exchange(tmp_path: Path) -> Path:
    """The exchange folder, which must be empty again at the end."""
    folder = tmp_path / "exchange"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake in the place of vLLM."""
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **options: options
    lora: Any = ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda name, number, folder, load_inplace: SimpleNamespace(
        name=name, folder=folder, load_inplace=load_inplace
    )
    parallel: Any = ModuleType("vllm.distributed")
    parallel.parallel_state = SimpleNamespace(cleanup_dist_env_and_memory=lambda: None)
    for name, part in (
        ("vllm", module),
        ("vllm.lora", ModuleType("vllm.lora")),
        ("vllm.lora.request", lora),
        ("vllm.distributed", parallel),
    ):
        monkeypatch.setitem(sys.modules, name, part)
    # As the engine sets it for good, and only if it is not set.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    for name in ("resets", "takes_adapters"):
        monkeypatch.setattr(FakeLLM, name, True)
    return module


@pytest.fixture
def make_engine(exchange: Path) -> Iterator[Callable[..., VLLMEngine]]:
    """Engines that are closed at the end, with nothing left behind."""
    made: list[VLLMEngine] = []

    def make(**options: Any) -> VLLMEngine:
        made.append(VLLMEngine(max_model_len=64, exchange_folder=str(exchange), **options))
        return made[-1]

    yield make
    for engine in made:
        config = engine._config
        engine.close()
        assert config is None or not Path(config.name).exists()
    assert list(exchange.iterdir()) == []


@pytest.fixture(params=["stream", "folder"])
def engine(request: Any, make_engine: Callable[..., VLLMEngine]) -> VLLMEngine:
    """An engine by each way of handing over whole weights."""
    return make_engine(transport=request.param)


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
    started = ["reset_prefix_cache"]
    if engine.transport == "stream":
        started = ["reload_weights", *started]
    assert llm.calls == [*started, *["reload_weights", "reset_prefix_cache"] * 2]
    for loaded, expected in zip(llm.loaded, [values[0], values[2], values[3]], strict=True):
        assert torch.equal(loaded[name], expected)
        assert loaded[name].dtype == torch.bfloat16


def test_same_step_after_a_checkpoint_was_loaded_is_refreshed_again(
    engine: VLLMEngine, model: Any
) -> None:
    generate(engine, model)
    calls = len(FakeLLM.made.calls)
    engine.forget()
    generate(engine, model)
    assert FakeLLM.made.calls[calls:] == ["reload_weights", "reset_prefix_cache"]


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
    weights = WeightsFolder(str(tmp_path))
    folder = weights.write(student, Form(torch.float32))
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name in read(str(folder)))
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)
    assert torch.equal(student(ids).logits, expected)


def test_a_stream_writes_no_file_below_the_exchange_folder(
    make_engine: Callable[..., VLLMEngine], exchange: Path, model: Any
) -> None:
    engine = make_engine()
    for step in range(5):
        generate(engine, model, step)
        assert list(exchange.iterdir()) == []
    llm = FakeLLM.made
    assert len(llm.loaded) == 5
    assert llm.core
    assert llm.options["load_format"] == "dummy"
    assert [file.name for file in Path(llm.options["model"]).iterdir()] == ["config.json"]


def test_what_vllm_sets_in_the_trainers_process_is_put_back(
    make_engine: Callable[..., VLLMEngine], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    state, threads = torch.random.get_rng_state(), torch.set_num_threads
    usual = FakeLLM.generate

    def rude(llm: FakeLLM, *arguments: Any, **options: Any) -> list[Any]:
        assert not torch.are_deterministic_algorithms_enabled()
        torch.set_num_threads = lambda count: None
        return usual(llm, *arguments, **options)

    monkeypatch.setattr(FakeLLM, "generate", rude)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generate(make_engine(), model)
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.set_num_threads is threads
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_adapters_alone_are_loaded_in_place_after_the_base_model_once(
    make_engine: Callable[..., VLLMEngine], exchange: Path, make_adapted: Any, model: Any
) -> None:
    engine, student = make_engine(dtype="float32"), make_adapted()
    layer, adapter = next((n, p) for n, p in student.named_parameters() if "lora_A" in n)
    values = []
    for step in range(3):
        generate(engine, student, step)
        values.append(adapter.detach().clone())
        adapter.data += 1.0
    llm = FakeLLM.made
    assert llm.options["enable_lora"]
    assert llm.options["max_lora_rank"] == 8  # the least that vLLM has for a rank of 4
    reset = "reset_prefix_cache"
    assert llm.calls == ["reload_weights", "add_lora", reset, "add_lora", reset, "add_lora", reset]
    for name, tensor in model.state_dict().items():  # of the same seed, without adapters
        assert torch.equal(llm.loaded[0][name], tensor)
    name = f"base_model.model.{layer.replace('.default', '')}"
    assert [torch.equal(each[name], values[i]) for i, each in enumerate(llm.adapters)] == [True] * 3
    assert all(not request.load_inplace for request in llm.used)
    # In a real model they are small; what is written is theirs alone.
    trained = sum(p.numel() for n, p in student.named_parameters() if "lora_" in n)
    size = sum(tensor.nbytes for tensor in llm.adapters[0].values())
    assert size == 4 * trained
    assert engine.folder.bytes_written < size + 40_000  # names, and the config


def test_adapters_are_merged_where_another_transport_is_asked_for(
    make_engine: Callable[..., VLLMEngine], make_adapted: Any
) -> None:
    student = make_adapted()
    generate(make_engine(transport="stream", dtype="float32"), student)
    (loaded,) = FakeLLM.made.loaded
    merged = dict(merged_copy(student).named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in merged.items())
    assert FakeLLM.made.used == [None]
    assert "enable_lora" not in FakeLLM.made.options


def test_adapters_that_vllm_does_not_take_are_an_error_with_the_remedy(
    make_engine: Callable[..., VLLMEngine], make_adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeLLM, "takes_adapters", False)
    with pytest.raises(UserError, match=r"expected target modules.*transport=stream"):
        generate(make_engine(), make_adapted())


def test_adapters_that_are_not_there_are_refused(
    make_engine: Callable[..., VLLMEngine], model: Any
) -> None:
    with pytest.raises(UserError, match="got adapters, but the student has none"):
        generate(make_engine(transport="adapters"), model)


def test_rank_that_vllm_does_not_know_is_merged_or_refused(
    make_engine: Callable[..., VLLMEngine], make_adapted: Any
) -> None:
    student = make_adapted(LoRA(r=600))
    with pytest.raises(UserError, match=r"lora.r: got 600, vLLM takes adapters of rank 512"):
        generate(make_engine(transport="adapters"), student)
    generate(make_engine(), student)
    assert "enable_lora" not in FakeLLM.made.options


def test_stream_does_not_reach_other_processes() -> None:
    with pytest.raises(UserError, match=r"transport: stream .* tensor_parallel_size=2"):
        VLLMEngine(transport="stream", tensor_parallel_size=2)
    with pytest.raises(UserError, match=r"transport: got 'nccl'"):
        VLLMEngine(transport="nccl")  # type: ignore[arg-type]


def test_vllm_sleeps_while_the_student_trains_and_gets_its_weights_when_it_wakes(
    make_engine: Callable[..., VLLMEngine], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_file, "_on_gpu", lambda student: True)
    engine = make_engine()
    generate(engine, model)
    generate(engine, model)  # the same step: its weights are gone, too
    first = ["reload_weights", "reset_prefix_cache", "sleep 2"]
    second = ["wake weights", "reload_weights", "reset_prefix_cache", "wake kv_cache", "sleep 2"]
    assert FakeLLM.made.calls == [*first, *second]
    assert FakeLLM.made.options["enable_sleep_mode"]


def test_base_model_below_adapters_outlives_the_sleep(
    make_engine: Callable[..., VLLMEngine], make_adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_file, "_on_gpu", lambda student: True)
    engine, student = make_engine(), make_adapted()
    generate(engine, student)
    generate(engine, student, 1)
    assert FakeLLM.made.calls.count("reload_weights") == 1
    assert FakeLLM.made.calls.count("sleep 1") == 2


def test_vllm_that_shall_not_sleep_does_not(
    make_engine: Callable[..., VLLMEngine], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_file, "_on_gpu", lambda student: True)
    generate(make_engine(sleep=False), model)
    assert FakeLLM.made.options["enable_sleep_mode"] is False
    assert not any("sleep" in call for call in FakeLLM.made.calls)


def test_only_the_newest_weights_stay_and_none_is_written_over(tmp_path: Path, model: Any) -> None:
    weights = WeightsFolder(str(tmp_path))
    first = weights.write(model, Form(torch.bfloat16))
    second = weights.write(model, Form(torch.bfloat16))
    assert first != second
    assert list(second.parent.iterdir()) == [second]


def test_weights_do_not_outlive_an_engine_that_nobody_closed(tmp_path: Path, model: Any) -> None:
    weights = WeightsFolder(str(tmp_path))
    weights.write(model, Form(torch.bfloat16))
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
    weights = WeightsFolder(parent)
    folder = weights.write(LlamaForCausalLM(config), Form(torch.float32))
    Path(f"{parent}/told-{rank}").write_text(f"{folder} {len(read(str(folder)))}")
    dist.barrier()  # rank zero removes it when it ends
    try:
        absent = WeightsFolder(f"{parent}/absent")
        absent.write(LlamaForCausalLM(config), Form(torch.float32))
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
        WeightsFolder(str(tmp_path / "absent")).write(model, Form(torch.bfloat16))


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
