"""Our responses and metrics against those of lm-evaluation-harness with its own model class."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite, BenchmarkTask
from sdft_lightning.data.benchmarks.harness_model import request_key
from sdft_lightning.data.benchmarks.tasks import FEWSHOT_SEED
from sdft_lightning.errors import UserError
from sdft_lightning.modules.capability import CapabilityScores
from sdft_lightning.types import RequestResponse


class _Module:
    """As much of a module as responses need."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.gather_student = lambda: model
        self.tokenizer = tokenizer
        self.stop_ids = [tokenizer.eos_token_id]


def respond(suite: BenchmarkSuite, model: Any, tokenizer: Any) -> list[RequestResponse]:
    scores = CapabilityScores()
    for index in range(len(suite.dataset)):
        scores.respond(_Module(model, tokenizer), suite.dataset[[index]])
    return scores.responses


def build(folder: Path, model_folder: Path, *names: str, **settings: Any) -> BenchmarkSuite:
    tasks = [BenchmarkTask(str(folder / f"{name}.yaml"), **settings) for name in names]
    return BenchmarkSuite(Benchmarks(tasks, batch_size=5), str(model_folder))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_fewshot": 2}, {"apply_chat_template": True}, {"limit": 3}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_log_likelihoods_and_metrics_are_the_harness_s(
    task_folder: Path,
    model_folder: Path,
    model: Any,
    tokenizer: Any,
    harness_results: Callable[..., Any],
    settings: dict[str, Any],
) -> None:
    suite = build(task_folder, model_folder, "choice", **settings)
    responses = respond(suite, model, tokenizer)
    ours = suite.metrics(responses)
    suite.tasks[0].leaves["tiny_choice"].set_fewshot_seed(seed=FEWSHOT_SEED)
    theirs = harness_results(
        suite.tasks[0].loaded,
        limit=settings.get("limit"),
        apply_chat_template=settings.get("apply_chat_template", False),
    )
    by_key = {suite.scored[response.request]: response.score for response in responses}
    compared = 0
    for sample in theirs["samples"]["tiny_choice"]:
        for arguments, given in zip(sample["arguments"], sample["resps"], strict=True):
            score = by_key[request_key("loglikelihood", arguments)]
            log_likelihood, greedy = given[0]
            assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-3)
            assert score.is_greedy == greedy
            compared += 1
    assert compared == 4 * settings.get("limit", 4)
    for metric in ("acc", "acc_norm"):
        expected = theirs["results"]["tiny_choice"]
        assert ours[f"tiny_choice/{metric}"].value == expected[f"{metric},none"]
        assert ours[f"tiny_choice/{metric}"].stderr == expected[f"{metric}_stderr,none"]


def test_rolling_log_likelihoods_are_the_harness_s(
    task_folder: Path,
    model_folder: Path,
    model: Any,
    tokenizer: Any,
    harness_results: Callable[..., Any],
) -> None:
    suite = build(task_folder, model_folder, "rolling")
    # Two texts have more tokens than the model takes, so that windows are joined.
    lengths = [[len(row[1]) for row in plan.rows] for plan in suite.dataset.plans]
    assert lengths == [[512, 512], [238, 248], [13, 1]]  # and short ones are not padded to long
    ours = suite.metrics(respond(suite, model, tokenizer))
    theirs = harness_results(suite.tasks[0].loaded)["results"]["tiny_rolling"]
    value = ours["tiny_rolling/word_perplexity"].value
    assert value == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)


def test_answers_are_the_harness_s_and_end_at_the_stop_text(
    task_folder: Path,
    model_folder: Path,
    model: Any,
    tokenizer: Any,
    harness_results: Callable[..., Any],
) -> None:
    yaml = task_folder / "generation.yaml"
    template = yaml.read_text()
    free = build(task_folder, model_folder, "generation")
    texts = [r.text or "" for r in respond(free, model, tokenizer)]
    assert max(map(len, texts)) > 4
    stop = max(texts, key=len)[3:5]  # two characters, hence two tokens, in the middle of an answer
    yaml.write_text(template.replace("STOP", repr(stop)))
    suite = build(task_folder, model_folder, "generation")
    responses = respond(suite, model, tokenizer)
    theirs = harness_results(suite.tasks[0].loaded)
    by_key = {suite.answered[response.request]: response.text for response in responses}
    for sample in theirs["samples"]["tiny_generation"]:
        expected = sample["resps"][0][0]
        assert by_key[request_key("generate_until", sample["arguments"][0])] == expected
        assert stop not in expected
    assert any(len(r.text or "") < len(text) for r, text in zip(responses, texts, strict=True))


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "told"),
    [(NO_SYSTEM, "refuses a system turn"), (DROPS_SYSTEM, "leaves out 'Be brief.")],
    ids=["refuses", "drops"],
)
def test_template_without_a_system_turn_asks_as_the_harness_does_and_tells(
    template: str,
    told: str,
    task_folder: Path,
    model_folder: Path,
    model: Any,
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(folder)
    with caplog.at_level("WARNING"):
        suite = build(
            task_folder,
            folder,
            "choice",
            "generation",
            apply_chat_template=True,
            system_instruction="Be brief.",
        )
    assert sum(told in record.message for record in caplog.records) == 1
    ours = suite.metrics(respond(suite, model, tokenizer))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=512)
    for task in suite.tasks:
        for leaf in task.leaves.values():
            leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
        expected = evaluate(
            lm=theirs,
            task_dict=task.loaded,
            apply_chat_template=True,
            system_instruction="Be brief.",
            bootstrap_iters=0,
        )
        ((name, metrics),) = expected["results"].items()
        for key, value in metrics.items():
            if key.endswith(",none") and not key.startswith("sample") and "stderr" not in key:
                assert ours[f"{name}/{key.removesuffix(',none')}"].value == pytest.approx(value)


def test_template_that_fails_in_a_benchmark_is_a_sentence(
    task_folder: Path, model_folder: Path, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    make_tokenizer("{{ 1 / 0 }}").save_pretrained(folder)
    with pytest.raises(UserError, match=r"data\.benchmarks\.tasks: .*ZeroDivisionError"):
        build(task_folder, folder, "choice", apply_chat_template=True)


def test_a_second_validation_gets_the_same_examples(
    task_folder: Path, model_folder: Path, model: Any, tokenizer: Any
) -> None:
    suite = build(task_folder, model_folder, "choice", num_fewshot=2)
    responses = respond(suite, model, tokenizer)
    assert suite.metrics(responses) == suite.metrics(responses)


def test_responses_may_come_in_any_order(
    task_folder: Path, model_folder: Path, model: Any, tokenizer: Any
) -> None:
    suite = build(task_folder, model_folder, "choice", "rolling", "generation")
    responses = respond(suite, model, tokenizer)
    assert suite.metrics(responses) == suite.metrics(responses[::-1])


def test_missing_and_double_responses_are_refused(
    task_folder: Path, model_folder: Path, model: Any, tokenizer: Any
) -> None:
    suite = build(task_folder, model_folder, "choice", "rolling", "generation")
    responses = respond(suite, model, tokenizer)
    text = next(response for response in responses if response.text is not None)
    for wrong in (responses[1:], [*responses, responses[0]], [r for r in responses if r != text]):
        with pytest.raises(UserError, match="responses to"):
            suite.metrics(wrong)


def test_a_rank_without_a_batch_gets_one_without_rows(
    task_folder: Path, model_folder: Path, model: Any, tokenizer: Any
) -> None:
    suite = build(task_folder, model_folder, "choice")
    batch = suite.dataset[[len(suite.dataset)]]
    assert batch.requests == []
    scores = CapabilityScores()
    scores.respond(_Module(model, tokenizer), batch)
    assert scores.responses == []


def test_every_request_stands_in_exactly_one_batch(task_folder: Path, model_folder: Path) -> None:
    suite = build(task_folder, model_folder, "choice", "generation")
    scored = [
        request
        for index in range(len(suite.dataset))
        for request in suite.dataset[[index]].requests
        if hasattr(suite.dataset[[index]], "owner")
    ]
    assert sorted(scored) == list(range(len(suite.scored)))
