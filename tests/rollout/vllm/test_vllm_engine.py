"""vLLM in the run itself: real steps of SDFT with the embedded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.forward.hidden import completion_hidden_states, output_head
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.lora import LoRA
from sdft_lightning.rollout import (
    RolloutRequest,
    Sampling,
    StudentPasses,
    VLLMEngine,
    trained_log_probs,
)
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.types import Tokens

# vLLM computes in bfloat16 here, 8 bits of mantissa; the trainer in float32. Each of 30 layers
# rounds its activations by up to 2⁻⁹ of them. Measured on the 40 fixed tokens: 0.03 to 0.05 nats a
# token, and 0.17 after one step without refresh, 0.32 after four (docs/vllm.md).
NOISE = 0.1


class KeptEngine(VLLMEngine):
    """Outlives the runs of this file, as vLLM takes its time to start; can be left stale."""

    stale = False

    def __init__(self, **options: Any) -> None:
        super().__init__(max_model_len=512, enforce_eager=True, **options)
        self.seconds: list[float] = []  # of each hand-over but the first, which starts vLLM

    def refresh(self, student: Any, step: int) -> None:
        if self.stale and step > 0:
            return
        begins, started = self._llm is None, time.perf_counter()
        super().refresh(student, step)
        if not begins:
            self.seconds.append(time.perf_counter() - started)

    def close(self) -> None:
        """Not yet."""

    def score(self, ids: list[int]) -> Tensor:
        """Its log-probabilities of given tokens but the first."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        adapters = {} if self._request is None else {"lora_request": self._request}
        (output,) = self._llm.generate(
            [{"prompt_token_ids": ids}], params, use_tqdm=False, **adapters
        )
        pairs = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return torch.tensor([every[token].logprob for every, token in pairs])


class Compare(L.Callback):
    """Asks both about the fixed tokens, before the optimizer moves the weights that sampled."""

    def __init__(
        self,
        engine: KeptEngine,
        ids: list[int],
        trained: Callable[[Any], Tensor],
        exchange: Path | None = None,
    ) -> None:
        self.engine, self.ids, self.trained = engine, ids, trained
        self.exchange = exchange
        self.files: list[int] = []  # below the exchange folder, at each step
        self.apart: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.student: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        ours = self.trained(module.student)
        if self.exchange is not None:
            self.files.append(len([each for each in self.exchange.rglob("*") if each.is_file()]))
        self.student.append(ours)
        self.apart.append(float((self.engine.score(self.ids) - ours).abs().mean()))

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        values = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in values})


SECONDS: dict[str, list[float]] = {}  # of the hand-overs by each transport


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exchange folder of all engines."""
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module", params=["stream", "folder"])
def engine(request: Any, exchange: Path) -> Iterator[KeptEngine]:
    """One vLLM for each way of handing over whole weights."""
    kept = KeptEngine(transport=request.param, exchange_folder=str(exchange))
    yield kept
    VLLMEngine.close(kept)
    SECONDS[request.param] = kept.seconds
    if len(SECONDS) == 2:
        stream, folder = (sum(each) / len(each) for each in SECONDS.values())
        print(f"seconds of a hand-over: {stream:.2f} by stream, {folder:.2f} by folder,")
        print(f"ratio {stream / folder:.2f}")


def test_after_each_of_five_refreshes_vllm_agrees_with_the_trainer_within_bfloat16_noise(
    engine: KeptEngine,
    exchange: Path,
    fit_embedded: Any,
    fixed_ids: list[int],
    trained: Callable[[Any], Tensor],
) -> None:
    compare = Compare(engine, fixed_ids, trained, exchange)
    fit_embedded(engine, 5, compare, mismatch=Mismatch("sequence"))

    print("fresh", compare.apart, compare.logged)
    assert len(compare.apart) == 5
    assert len(compare.files) == 5
    assert [bool(count) for count in compare.files] == [engine.transport == "folder"] * 5
    assert max(compare.apart) < NOISE
    # The weights did move, each step, by more than that.
    assert float((compare.student[4] - compare.student[0]).abs().mean()) > 2 * NOISE
    # So for what was sampled, at most 16 tokens a step, unlikely ones among them.
    differences = [values["train/sampler/log_prob_difference"] for values in compare.logged]
    assert 0 < max(differences) < 2 * NOISE
    assert all(abs(values["train/sampler/ratio"] - 1) < 2 * NOISE for values in compare.logged)
    assert all(values["train/loss"] > 0 for values in compare.logged)


def test_without_the_refresh_the_same_comparison_tells_and_the_alarm_is_given(
    engine: KeptEngine,
    fit_embedded: Any,
    fixed_ids: list[int],
    trained: Callable[[Any], Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    compare = Compare(engine, fixed_ids, trained)
    engine.forget()  # the run before has left its last weights
    engine.stale = True
    fit_embedded(engine, 5, compare)
    engine.stale = False

    print("stale", compare.apart, compare.logged)
    assert compare.apart[0] < NOISE
    assert max(compare.apart[1:]) > 2 * NOISE
    assert "trainer and sampler differ" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.6}, {"top_p": 0.6}, {"top_k": 4}, {"min_p": 0.2, "temperature": 1.3}],
    ids=str,
)
def test_log_probs_are_of_the_distribution_that_is_sampled_from(
    engine: KeptEngine, fixed_ids: list[int], options: dict[str, Any]
) -> None:
    if engine.transport == "folder":
        pytest.skip("how weights come is all that differs")
    student = load_policy(Policy("embedded")).model
    engine.forget()
    sampling = Sampling(12, completions_per_prompt=2, **options)
    prompt = torch.tensor([[0, 0, *fixed_ids[:14]]])  # (1, P)
    mask = torch.tensor([[False] * 2 + [True] * 14])  # (1, P)
    request = RolloutRequest(Tokens(prompt, mask), ["a"], sampling, 1, 0, [2], 2)
    rollout = engine.generate(StudentPasses("same").at(student, 0), request)
    again = engine.generate(StudentPasses("same").at(student, 0), request)

    assert torch.equal(rollout.completion_ids, again.completion_ids)  # same seeds
    assert not torch.equal(rollout.completion_ids[0], rollout.completion_ids[1])  # own seeds
    keep = rollout.completion_mask  # (2, T)
    ended = [row[kept][-1] == 2 for row, kept in zip(rollout.completion_ids, keep, strict=True)]
    assert rollout.truncated.tolist() == [not end for end in ended]
    with torch.no_grad():
        hidden = completion_hidden_states(
            student,
            Tokens(prompt.repeat(2, 1), mask.repeat(2, 1)),
            Tokens(rollout.completion_ids, keep),
            keep,
        )
    tokens = rollout.completion_ids[keep]
    ours = trained_log_probs(hidden, output_head(student), tokens, sampling, truncated=True)
    difference = (ours - rollout.sampled_log_probs[keep]).abs()
    print(options, float(difference.mean()), float(difference.max()))
    assert float(difference.mean()) < NOISE
    plain = trained_log_probs(hidden, output_head(student), tokens, Sampling(12), truncated=False)
    apart = float((plain - rollout.sampled_log_probs[keep]).abs().mean())
    assert apart > 2 * float(difference.mean())


@pytest.fixture(scope="module")
def adapting(exchange: Path) -> Iterator[KeptEngine]:
    """A vLLM for adapters."""
    kept = KeptEngine(exchange_folder=str(exchange))
    yield kept
    VLLMEngine.close(kept)


ADAPTERS = Policy("embedded", lora=LoRA(r=2))


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_adapters_alone_are_a_hundredth_of_the_model_and_vllm_follows_them(
    adapting: KeptEngine,
    stale: bool,
    fit_embedded: Any,
    fixed_ids: list[int],
    trained: Callable[[Any], Tensor],
) -> None:
    compare = Compare(adapting, fixed_ids, trained)
    adapting.forget()
    adapting.stale = stale
    module = fit_embedded(
        adapting,
        5,
        compare,
        policy=ADAPTERS,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    )
    print("adapters", "stale" if stale else "fresh", compare.apart)
    whole = sum(p.numel() for name, p in module.student.named_parameters() if "lora_" not in name)
    assert 0 < adapting.folder.bytes_written < 0.01 * 4 * whole  # the student is float32
    assert compare.apart[0] < NOISE
    if stale:
        assert max(compare.apart[1:]) > 2 * NOISE
    else:
        assert max(compare.apart) < NOISE
        assert float((compare.student[4] - compare.student[0]).abs().mean()) > 2 * NOISE
