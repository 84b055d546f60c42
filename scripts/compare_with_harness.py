"""Score benchmarks with ours and with lm-evaluation-harness's own model class, and compare.

    .venv/bin/python scripts/compare_with_harness.py --data_dir my/benchmarks

With `--check` the exit code is 1 where they disagree: by more than 1e-3 in a log-likelihood, in one
completion or metric, or, with `--at_most`, where the seconds' ratio is greater than that.

Every item's log-likelihoods and every completion are compared, and the seconds that both take to
answer the requests, in float32 on the CPU or GPU that there is. 200 items of all tasks take more
than an hour on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite, BenchmarkTask
from sdft_lightning.data.benchmarks.harness_model import request_key
from sdft_lightning.data.benchmarks.suite import seeded_grading
from sdft_lightning.data.benchmarks.tasks import FEWSHOT_SEED, quiet_harness
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.tokenization import load_max_length
from sdft_lightning.modules.capability import CapabilityScores

CONFIGS = Path(__file__).parents[1] / "configs" / "benchmarks"
SCORED = "arc_easy hellaswag truthfulqa_mc1 truthfulqa_mc2 mmlu winogrande wikitext"
ANSWERED = "gsm8k ifeval"


class _Module:
    """As much of a LightningModule as responses need."""

    def __init__(self, policy: Any) -> None:
        self.student, self.tokenizer, self.stop_ids = policy

    def gather_student(self) -> Any:
        """The model that answers."""
        return self.student


def compare(
    name: str, limit: int, options: argparse.Namespace, policy: Any, theirs: Any
) -> tuple[str, list[str]]:
    """Measure a task with both; return a line of the table, and what does not hold."""
    from lm_eval.evaluator import evaluate

    task = BenchmarkTask(str(CONFIGS / f"{name}.yaml"), limit=limit)
    settings = Benchmarks([task], batch_size=options.batch_size, data_dir=options.data_dir)
    suite = BenchmarkSuite(settings, options.model)
    module, scores = _Module(policy), CapabilityScores()
    start = time.perf_counter()
    for index in range(len(suite.dataset)):
        batch = suite.dataset[[index]]
        scores.respond(module, type(batch)(*(_moved(value, theirs.device) for value in batch)))
    ours_seconds = time.perf_counter() - start
    responses = list(scores.responses)
    measured = suite.metrics(responses)
    suite.tasks[0].leaves[suite.tasks[0].name].set_fewshot_seed(seed=FEWSHOT_SEED)
    theirs.seconds = 0.0
    with quiet_harness(), seeded_grading():
        expected: Any = evaluate(
            lm=theirs, task_dict=suite.tasks[0].loaded, limit=limit, bootstrap_iters=1000
        )
    theirs_seconds = theirs.seconds
    sums: dict[str, float] = {}
    texts: dict[str, str] = {}
    for response in responses:
        if response.text is None:
            key = suite.scored[response.request]
            sums[key] = sums.get(key, 0.0) + response.score.log_likelihood
        else:
            texts[suite.answered[response.request]] = response.text
    worst, same, count = 0.0, 0, 0
    for sample in next(iter(expected["samples"].values())):
        for arguments, given in zip(sample["arguments"], sample["resps"], strict=True):
            count += 1
            answer = given[0]
            if isinstance(answer, str):
                same += texts[request_key("generate_until", arguments)] == answer
            elif isinstance(answer, tuple):
                worst = max(worst, abs(sums[request_key("loglikelihood", arguments)] - answer[0]))
            else:
                key = request_key("loglikelihood_rolling", arguments)
                worst = max(worst, abs(sums[key] - answer))
    metrics = next(iter(expected["results"].values()))
    differences = [
        abs(measurement.value - metrics[metric if "," in metric else f"{metric},none"])
        for metric, measurement in ((k.rpartition("/")[2], m) for k, m in measured.items())
    ]
    agreement = f"{same} of {count} the same" if texts else f"{worst:.1e}"
    shown = ", ".join(f"{k.rpartition('/')[2]} {m.value:.4g}" for k, m in measured.items())
    ratio = ours_seconds / theirs_seconds
    failed = {
        f"{worst:.1e} in a log-likelihood": worst > 1e-3,
        f"{count - same} completions": bool(texts) and same < count,
        f"{max(differences):.1e} in a metric": max(differences)
        > 1e-5 * max(1.0, *(abs(m.value) for m in measured.values())),
        f"ratio {ratio:.2f}": options.at_most is not None and ratio > options.at_most,
    }
    line = (
        f"| {name} | {count} | {agreement} | {max(differences):.1e} | {shown} "
        f"| {ours_seconds:.1f} | {theirs_seconds:.1f} | {ratio:.2f} |"
    )
    return line, [f"{name}: {what}" for what, holds in failed.items() if holds]


def timed_model(**options: Any) -> Any:
    """The harness's HFLM, which adds up the seconds in which it answers requests."""
    from lm_eval.models.huggingface import HFLM

    class TimedHFLM(HFLM):  # type: ignore[misc]
        """HFLM with a clock around the three kinds of requests."""

        seconds = 0.0

        def _timed(self, kind: str, requests: Any) -> Any:
            start = time.perf_counter()
            try:
                return getattr(super(), kind)(requests, disable_tqdm=True)
            finally:
                self.seconds += time.perf_counter() - start

        def loglikelihood(self, requests: Any) -> Any:
            """Timed."""
            return self._timed("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            """Timed."""
            return self._timed("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any) -> Any:
            """Timed."""
            return self._timed("generate_until", requests)

    return TimedHFLM(**options)


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", nargs="+", default=f"{SCORED} {ANSWERED}".split())
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--limit_answered", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--check", action="store_true", help="exit with 1 where both disagree")
    parser.add_argument("--at_most", type=float, help="with --check: greatest ratio of the seconds")
    options = parser.parse_args()
    policy = load_policy(Policy(options.model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.model.to(device).eval()
    theirs = timed_model(
        pretrained=policy.model,
        tokenizer=policy.tokenizer,
        batch_size=options.batch_size,
        device=device,
        max_length=load_max_length(options.model, policy.tokenizer),
    )
    warm_up = torch.arange(64, device=device).reshape(2, 32)
    with torch.no_grad():
        policy.model(warm_up)  # whoever comes first would wait for the weights to be read
    print("| task | requests | largest difference | of a metric | metrics | s | harness | ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed: list[str] = []
    for name in options.tasks:
        limit = options.limit_answered if name in ANSWERED.split() else options.limit
        line, wrong = compare(name, limit, options, policy, theirs)
        failed += wrong
        print(line, flush=True)
    if options.check and failed:
        print("does not hold: " + "; ".join(failed))
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
