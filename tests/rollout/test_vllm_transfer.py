"""Weights to a server by vLLM's own transfer, as adapters, and for several processes.

vLLM's trainer engine is played by `Sender`, written to its documented protocol (vLLM 0.32, 0.33):
names, dtypes and shapes by HTTP while the tensors go by the wire, which the server checks.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMServerEngine
from sdft_lightning.rollout.vllm import server as server_file
from sdft_lightning.rollout.vllm import transfer as transfer_file
from sdft_lightning.rollout.vllm.weights import Form, weights_index, weights_stream
from sdft_lightning.types import Rollout, Tokens

NAME = "model.layers.0.mlp.down_proj.weight"
FIRST = ["/v1/models", "/server_info"]
CONNECT = ["/get_world_size", "/init_weight_transfer_engine"]
SEND = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
COMMIT = ["/reset_prefix_cache", "/update_weight_version"]
SAMPLE = ["/v1/completions"] * 4 + ["/weight_info"]


class Meta(NamedTuple):
    """vLLM's ParamMeta."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class OldSource:
    """vLLM's WeightSource before 0.33."""

    def metadata(self) -> list[Meta]:
        raise NotImplementedError


class NewSource:
    """The same since 0.33."""

    @property
    def metadata(self) -> list[Meta]:
        raise NotImplementedError


class Sender:
    """vLLM's trainer engine.

    Args:
        server: Whose wire stands for NCCL.
        info: Its TrainerInitInfo.
        client: What it asks of the server.
        source: The weights.
    """

    def __init__(self, server: Any, info: Any, client: Any, source: Any) -> None:
        self.server, self.client, self.source = server, client, source
        self.down = False
        client.init_weight_transfer_engine({"world_size": info.world_size})
        self.wire = server.wire = queue.Queue()

    def send_weights(self) -> None:
        meta = self.source.metadata
        meta = meta() if callable(meta) else meta
        info = {
            "names": [each.name for each in meta],
            "dtype_names": [str(each.dtype).removeprefix("torch.") for each in meta],
            "shapes": [list(each.shape) for each in meta],
        }
        stream = (
            iter(self.source) if isinstance(self.source, OldSource) else self.source.iter_full()
        )
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.client.update_weights, info)
            for name, tensor in stream:
                self.wire.put((name, tensor))
            asked.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.down = True


@pytest.fixture(params=[OldSource, NewSource], ids=["vllm 0.32", "vllm 0.33"])
def senders(request: Any, server: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Sender]:
    """The senders that were made; the server takes the tiny model by NCCL."""
    made: list[Sender] = []

    def trainer_init(info: Any, *, client: Any, source: Any) -> Sender:
        made.append(Sender(server, info, client, source))
        return made[-1]

    parts = {
        "base": {"ParamMeta": Meta, "WeightSource": request.param},
        "factory": {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=trainer_init)},
        "nccl_engine": {"NCCLTrainerInitInfo": SimpleNamespace},
    }
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"vllm.distributed.weight_transfer.{name}", module)
    monkeypatch.setattr(server_file, "transfer_problem", lambda backend, student: "")
    server.config["weight_transfer_config"] = {"backend": "nccl"}
    server.expected = expected(model, torch.float32)
    return made


def expected(model: Any, dtype: torch.dtype, **form: Any) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype by name."""
    name = str(dtype).removeprefix("torch.")
    return {
        entry.name: (list(entry.shape), name) for entry in weights_index(model, Form(dtype, **form))
    }


@pytest.fixture
def make_engine(server: Any, tmp_path: Path) -> Callable[..., VLLMServerEngine]:
    """Engines that give up soon."""
    few = {"timeout_seconds": 10.0, "max_retries": 2, "patience_seconds": 0.2, "dtype": "float32"}
    return partial(VLLMServerEngine, server.url, exchange_folder=str(tmp_path), **few)


def generate(engine: VLLMServerEngine, model: Any, step: int = 0, row: str = "a") -> Rollout:
    sampling = Sampling(5, completions_per_prompt=4)
    ids = torch.tensor([[3, 4, 5]])  # (1, P)
    mask = torch.ones_like(ids, dtype=torch.bool)  # (1, P)
    request = RolloutRequest(Tokens(ids, mask), [row], sampling, 1, step, [2, 9], 0)
    return engine.generate(StudentPasses("same").at(model, 0), request)


def told(rollout: Rollout) -> float:
    """The weight that all rows were sampled with."""
    (value,) = {float(each) for each in rollout.sampled_log_probs[:, 0]}
    return -value


def test_weights_come_in_the_order_of_the_protocol_whole_and_as_they_were_named(
    server: Any, senders: list[Sender], make_engine: Any, model: Any, tmp_path: Path
) -> None:
    engine = make_engine()
    for step in range(2):
        model.get_parameter(NAME).data.fill_(2.0 + step)
        assert told(generate(engine, model, step)) == 2.0 + step
        for name, tensor in weights_stream(model, Form(torch.float32)):
            assert torch.equal(server.received[name], tensor)
    first = [*FIRST, *CONNECT, *SEND, *COMMIT, *SAMPLE]
    assert server.asked == [*first, "/weight_info", *SEND, *COMMIT, *SAMPLE]
    assert len(senders) == 1
    assert list(tmp_path.iterdir()) == []  # no folder
    engine.close()
    assert senders[0].down


def test_weights_are_sent_in_the_dtype_of_the_server_with_adapters_merged(
    server: Any, senders: list[Sender], make_engine: Any, make_adapted: Any
) -> None:
    student = make_adapted()
    server.expected = expected(student, torch.bfloat16)
    generate(make_engine(dtype="bfloat16"), student)
    for name, tensor in weights_stream(student, Form(torch.bfloat16)):
        assert torch.equal(server.received[name], tensor)


def test_weight_that_is_left_out_is_noticed_and_the_error_names_server_and_remedy(
    server: Any, senders: list[Sender], make_engine: Any, model: Any, monkeypatch: Any
) -> None:
    index = weights_index(model, Form(torch.float32))
    monkeypatch.setattr(transfer_file, "weights_index", lambda *given: index[:-1])
    with pytest.raises(UserError, match=r"failed 3 times .*never sent: .*norm.* max_retries") as e:
        generate(make_engine(), model)
    assert server.url in str(e.value)
    assert server.completions == []


def test_weights_in_another_order_than_named_are_noticed(
    server: Any, senders: list[Sender], make_engine: Any, model: Any, monkeypatch: Any
) -> None:
    index = weights_index(model, Form(torch.float32))
    monkeypatch.setattr(transfer_file, "weights_index", lambda *given: index[::-1])
    with pytest.raises(UserError, match="came where"):
        generate(make_engine(max_retries=0), model)


def test_server_that_restarts_between_steps_is_connected_and_given_the_weights_again(
    server: Any, senders: list[Sender], make_engine: Any, model: Any
) -> None:
    engine = make_engine()
    generate(engine, model)
    server.restart()
    model.get_parameter(NAME).data.fill_(7.0)
    assert told(generate(engine, model, 1)) == 7.0
    assert [sender.down for sender in senders] == [True, False]
    assert server.asked.count("/start_weight_update") == 2  # none to a server that is not connected


@pytest.mark.parametrize("path", [CONNECT[1], *SEND, *COMMIT, "/v1/completions"])
@pytest.mark.parametrize("status", [500, 0])
def test_server_that_restarts_in_the_middle_gets_all_of_it_again(
    status: int, path: str, server: Any, senders: list[Sender], make_engine: Any, model: Any
) -> None:
    failures: list[str] = []

    def fault(asked: str) -> int | None:
        if asked == path and not failures:
            failures.append(asked)
            server.restart()
            return status
        return None

    server.fault = fault
    model.get_parameter(NAME).data.fill_(5.0)
    assert told(generate(make_engine(), model)) == 5.0
    assert failures == [path]
    assert server.asked.count(CONNECT[1]) == 2


@pytest.mark.parametrize("path", [CONNECT[1], *SEND])
def test_server_that_refuses_is_asked_a_bounded_number_of_times(
    path: str, server: Any, senders: list[Sender], make_engine: Any, model: Any
) -> None:
    server.fault = lambda asked: 503 if asked == path else None
    with pytest.raises(UserError, match=rf"{server.url} failed 3 times .*{path}: status 503"):
        generate(make_engine(), model)
    assert server.asked.count(path) == 3
    assert server.completions == []


def test_what_the_server_calls_wrong_is_not_tried_again(
    server: Any, senders: list[Sender], make_engine: Any, model: Any
) -> None:
    server.fault = lambda asked: 400 if asked == "/update_weights" else None
    with pytest.raises(UserError, match=rf"{server.url} refused /update_weights \(400\)"):
        generate(make_engine(), model)
    assert server.asked.count("/update_weights") == 1
    server.fault = lambda asked: 404 if asked == "/start_weight_update" else None
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        generate(make_engine(), model)


def test_nccls_own_errors_begin_the_rollout_again(
    server: Any, senders: list[Sender], make_engine: Any, model: Any, monkeypatch: Any
) -> None:
    def broken(sender: Sender) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(Sender, "send_weights", broken)
    with pytest.raises(UserError, match=r"failed 3 times .*by nccl: NCCL error"):
        generate(make_engine(), model)
    assert [sender.down for sender in senders] == [True] * 3


def test_transport_that_the_server_or_the_trainer_has_not_is_refused_with_the_remedy(
    server: Any, make_engine: Any, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"got nccl, but .*started for None.*--weight-transfer-conf"
    ):
        generate(make_engine(transport="nccl"), model)
    server.config["weight_transfer_config"] = {"backend": "ipc"}
    with pytest.raises(UserError, match=r"got nccl, but .*started for 'ipc'"):
        generate(make_engine(transport="nccl"), model)
    with pytest.raises(UserError, match=r"got ipc, which sends from a GPU.*transport: folder"):
        generate(make_engine(transport="ipc"), model)
    generate(make_engine(), model)  # auto: the folder works everywhere
    assert "/collective_rpc" in server.asked


# --- adapters -------------------------------------------------------------------------------------

ADAPTERS = "/v1/load_lora_adapter"


@pytest.fixture
def takes_adapters(server: Any) -> None:
    """The server was started for adapters."""
    server.config["lora_config"] = {"max_lora_rank": 16}


def adapter_sum(student: Any) -> float:
    """What the server's log-probabilities tell of adapters."""
    return abs(float(sum(p.sum() for name, p in student.named_parameters() if "lora_" in name)))


@pytest.mark.usefixtures("takes_adapters")
def test_adapters_alone_follow_the_base_model_and_the_restart_of_a_server(
    server: Any, make_engine: Any, make_adapted: Any
) -> None:
    engine, student = make_engine(), make_adapted()
    adapter = next(p for name, p in student.named_parameters() if "lora_A" in name)
    for step in range(3):
        adapter.data += 1.0
        if step == 2:
            server.restart()
        assert told(generate(engine, student, step)) == pytest.approx(adapter_sum(student))
    refresh = [ADAPTERS, *COMMIT, *SAMPLE]
    base = ["/collective_rpc", *refresh]
    assert server.asked == [*FIRST, *base, "/weight_info", *refresh, "/weight_info", *base]
    assert {body["model"] for body in server.completions} == set(server.loaded)
    engine.close()
    assert server.loaded == {}


@pytest.mark.usefixtures("takes_adapters")
def test_server_that_lost_the_adapters_while_it_sampled_gets_them_again(
    server: Any, make_engine: Any, make_adapted: Any
) -> None:
    failures: list[str] = []

    def fault(asked: str) -> int | None:
        if asked == "/v1/completions" and not failures:
            failures.append(asked)
            server.restart()
            return 404  # it does not know the adapters' name any longer
        return None

    server.fault = fault
    student = make_adapted()
    assert told(generate(make_engine(), student)) == pytest.approx(adapter_sum(student))
    assert server.asked.count(ADAPTERS) == 2


def test_server_without_adapters_gets_them_merged_or_is_refused_with_the_remedy(
    server: Any, make_engine: Any, make_adapted: Any, model: Any
) -> None:
    student = make_adapted()
    generate(make_engine(), student)
    assert ADAPTERS not in server.asked
    match = "takes none.*--enable-lora --max-lora-rank 8 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    with pytest.raises(UserError, match=match):
        generate(make_engine(transport="adapters"), student)
    server.config["lora_config"] = {"max_lora_rank": 1}
    with pytest.raises(UserError, match="takes those of rank 1 and less"):
        generate(make_engine(transport="adapters"), student)
    with pytest.raises(UserError, match="got adapters, but the student has none"):
        generate(make_engine(transport="adapters"), model)


@pytest.mark.usefixtures("takes_adapters")
def test_server_that_does_not_take_the_adapters_is_told_with_its_words(
    server: Any, make_engine: Any, make_adapted: Any
) -> None:
    server.fault = lambda asked: 404 if asked == ADAPTERS else None
    with pytest.raises(UserError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.*transport=folder"):
        generate(make_engine(), make_adapted())


# --- several processes ----------------------------------------------------------------------------


def sample_in_a_group(rank: int, folder: str, url: str) -> None:
    """One of two processes on one server; leaves what it sampled, and the error that both heard."""
    from torch import distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    student = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    student.get_parameter(NAME).data.fill_(4.0)
    few: dict[str, Any] = {"timeout_seconds": 10.0, "max_retries": 1, "patience_seconds": 0.2}
    engine = VLLMServerEngine(url, exchange_folder=folder, dtype="float32", **few)
    Path(f"{folder}/told-{rank}").write_text(str(told(generate(engine, student, row=str(rank)))))
    try:
        generate(engine, student, step=1, row=str(rank))
    except UserError as error:
        Path(f"{folder}/error-{rank}").write_text(str(error))
    dist.barrier()  # rank zero removes its folder when it ends
    dist.destroy_process_group()


def test_one_server_serves_all_processes_which_begin_again_together(
    server: Any, tmp_path: Path
) -> None:
    failures: list[str] = []

    def fault(asked: str) -> int | None:
        done = server.asked.count("/v1/completions")
        if asked == "/v1/completions" and (done == 3 or done > 16):
            failures.append(asked)
            return 500  # to one of the two; later to all
        return None

    server.fault = fault
    torch.multiprocessing.spawn(sample_in_a_group, (str(tmp_path), server.url), nprocs=2)
    assert [(tmp_path / f"told-{rank}").read_text() for rank in range(2)] == ["4.0", "4.0"]
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert all("failed 2 times in one rollout" in error for error in errors)
    assert server.asked.count("/collective_rpc") == 4  # each try once, by rank zero
