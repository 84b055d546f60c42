"""Time sampling with given lengths.

`python tests/perf/sampling.py ours|generate|generate_copy '<workload as JSON>' equal|tail`; with
`tail`, one row in eight is as long as the workload says and the others an eighth of it.

In bfloat16, `ours` samples as a training step does: under autocast, and where the processor
multiplies bfloat16 from the copy that is kept of the weights, whose refreshing counts. `generate`
samples as other trainers do, from float32 weights under autocast, and `generate_copy` from the
bfloat16 copy.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from workload import Workload, make_rows, peak_gigabytes

import sdft_lightning.rollout.generate as generate_module
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.rollout import Sampling, generate_rollout
from sdft_lightning.rollout.sampling import choose_tokens, row_uniforms
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Tokens

REPEATS = 2


def row_lengths(workload: Workload, tail: bool) -> list[int]:
    """Tokens of each row's completion, its stop token included."""
    short = max(2, workload.new_tokens // 8)
    return [
        workload.new_tokens if not tail or row % 8 == 0 else short
        for row in range(workload.micro_batch * workload.completions)
    ]


class EndAt(LogitsProcessor):  # type: ignore[misc]
    """Ends each row at its length, and not before."""

    def __init__(self, lengths: list[int], prompt: int, stops: list[int]) -> None:
        self.lengths = torch.tensor(lengths)
        self.prompt = prompt
        self.stops = stops

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbid the stop tokens, or everything else."""
        last = self.lengths == input_ids.shape[1] - self.prompt + 1  # (R,)
        scores[:, self.stops] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.stops[0]] = 0.0
        return scores


def with_generate(
    model: Any, ids: Tensor, mask: Tensor, lengths: list[int], stops: list[int]
) -> Any:
    """Transformers' own sampling."""
    return model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=max(lengths),
        eos_token_id=stops,
        pad_token_id=stops[0],
        logits_processor=LogitsProcessorList([EndAt(lengths, ids.shape[1], stops)]),
    )[:, ids.shape[1] :]


def with_ours(model: Any, ids: Tensor, mask: Tensor, lengths: list[int], stops: list[int]) -> Any:
    """Ours; a uniform number of 2 stands for the end of a row."""
    uniforms = row_uniforms(0, 0, [str(row) for row in range(len(lengths))], 1, max(lengths))
    for row, length in enumerate(lengths):
        uniforms[row, length - 1] = 2.0

    def choose(logits: Tensor, sampling: Sampling, numbers: Any) -> tuple[Tensor, Tensor]:
        ends = numbers >= 1
        logits[:, stops] = -torch.inf
        tokens, log_probs = choose_tokens(logits, sampling, numbers.clamp(max=0.5))
        return torch.where(ends, stops[0], tokens), log_probs

    generate_module.choose_tokens = choose
    sampling = Sampling(max_new_tokens=max(lengths))
    return generate_rollout(
        model, Tokens(ids, mask), sampling, uniforms, stops, stops[0]
    ).completion_ids


def main(kind: str, workload: Workload, tail: bool) -> None:
    """Print the median seconds and how many tokens came out."""
    policy = load_policy(Policy(workload.model))
    rows = make_rows(workload, workload.micro_batch)
    messages = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    encoded = policy.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
    lengths, stops = row_lengths(workload, tail), list(policy.stop_ids)
    sample = with_ours if kind == "ours" else with_generate
    reduced = workload.precision == "bf16"
    dtypes: dict[str, Any] = {"ours": "auto", "generate_copy": "bfloat16"}
    weights = StudentPasses(dtypes.get(kind, "same") if reduced else "same")
    casts = reduced and kind != "generate_copy"
    context = torch.autocast("cpu", torch.bfloat16) if casts else None
    policy.model.eval().requires_grad_(True)
    weights.at(policy.model, 0).sampler()  # as before the first step of a run
    seconds = []
    with torch.no_grad(), context or nullcontext():
        for repeat in range(REPEATS):
            start = time.perf_counter()
            model = weights.at(policy.model, repeat + 1).sampler()
            completions = sample(model, ids, mask, lengths, stops)
            seconds.append(time.perf_counter() - start)
    ends = torch.isin(completions, torch.tensor(stops)).int().argmax(dim=1) + 1  # (R,)
    assert ends.tolist() == lengths, (ends.tolist(), lengths)
    figures = {
        "seconds": median(seconds),
        "tokens": sum(lengths),
        "prompt_tokens": ids.shape[1],
        "peak_gigabytes": peak_gigabytes(),
    }
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], Workload.load(sys.argv[2]), sys.argv[3] == "tail")
