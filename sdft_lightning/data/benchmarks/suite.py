"""The benchmarks of a run: requests of the harness out, metrics of the harness back."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from sdft_lightning.data.benchmarks import Benchmarks
from sdft_lightning.data.benchmarks.batches import (
    GenerationPlan,
    RequestDataset,
    ScoringPlan,
    generation_plans,
    scoring_plans,
)
from sdft_lightning.data.benchmarks.task_yaml import sandboxed_templates
from sdft_lightning.data.benchmarks.tasks import (
    FEWSHOT_SEED,
    LoadedTask,
    explained,
    load_tasks,
    metric_label,
    quiet_harness,
)
from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.texts import digest
from sdft_lightning.models.tokenization import load_max_length, load_tokenizer, vocabulary_size
from sdft_lightning.types import (
    ContinuationScore,
    Items,
    Measurement,
    RequestResponse,
)

if TYPE_CHECKING:
    from sdft_lightning.data.benchmarks.harness_model import (
        Part,
        RequestCollector,
        RequestKey,
        ResponsePlayer,
    )


_SEED = 1234


@contextmanager
def seeded_grading() -> Iterator[None]:
    """Fix what graders draw, and put the random state back after them.

    IFEval guesses an answer's language with langdetect, which without a seed may take the same
    short text for another language the next time, and draws what an instruction leaves open.
    """
    state = random.getstate()
    random.seed(_SEED)
    langdetect = sys.modules.get("langdetect")  # loaded with the tasks that need it
    factory = getattr(langdetect, "DetectorFactory", None)
    seed = getattr(factory, "seed", None)
    if factory is not None:
        factory.seed = _SEED
    try:
        yield
    finally:
        random.setstate(state)
        if factory is not None:
            factory.seed = seed


# Bootstrap draws for the standard error of metrics that are no plain mean; the harness's default
# of 100,000 takes minutes for some.
_BOOTSTRAP_DRAWS = 1000


class BenchmarkSuite:
    """The tasks of a run with their requests, as a list of batches.

    Args:
        options: Which tasks, and how.
        model_name: The policy's.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: See `load_tasks`; or if metrics that are unlike would be averaged.
    """

    def __init__(
        self, options: Benchmarks, model_name: str = "embedded", revision: str | None = None
    ) -> None:
        self.options = options
        from sdft_lightning.data.benchmarks.harness_model import RequestCollector

        self.every_n_validations = options.every_n_validations
        self.tokenizer = tokenizer = load_tokenizer(model_name, revision)
        self.max_length = max_length = load_max_length(model_name, tokenizer, revision)
        self.tasks = load_tasks(options)
        self.main_metrics = _main_metrics(self.tasks, options)
        collector = RequestCollector(tokenizer, max_length, vocabulary_size(model_name, revision))
        for task in self.tasks:
            for leaf in task.leaves.values():
                _collect(leaf, task, collector, options)
        self.fingerprint = _fingerprint(self.tasks, options)
        self._parts = [len(parts) for parts in collector.parts.values()]
        self._copies = [prompt.copies for prompt in collector.prompts.values()]
        self.scored: list[RequestKey] = list(collector.parts)
        self.answered: list[RequestKey] = list(collector.prompts)
        _check_lengths(collector.parts, max_length)
        self._plans: list[ScoringPlan | GenerationPlan] = [
            *scoring_plans(list(collector.parts.values()), options.batch_size),
            *generation_plans(list(collector.prompts.values()), options.batch_size),
        ]

    @property
    def counted(self) -> list[dict[str, Any]]:
        """What stands for the benchmarks: `name`, `metric` and `leaves` of each task.

        Where tasks name metrics, those tasks only; else all that were asked for, with None as
        metric. The leaves are what a tag consists of, of which the harness gives no figure.
        """
        named = [task for task in self.tasks if task.settings.metric]
        return [
            {"name": task.name, "metric": task.settings.metric, "leaves": list(task.leaves)}
            for task in named or self.tasks
        ]

    def metric_names(self) -> list[str]:
        """What `metrics` may come to, with standard errors, and the retention that a run adds."""
        found = {name for task in self.tasks for name in task.metric_names()}
        found |= {f"{name}_stderr" for name in found}
        if self.main_metrics:
            found |= {"mean", "mean_stderr", "retention"}
        return sorted(found)

    def item_names(self) -> list[str]:
        """Of which of `metrics` the scores of single items may be known."""
        found: set[str] = set()
        for task in self.tasks:
            of_group = task.group_metrics(task.name)
            for name in task.metric_names():
                leaf, _, label = name.rpartition("/")
                if leaf in task.leaves and _scores_items(task.leaves[leaf], label):
                    found.add(f"{task.name if label in of_group else leaf}/{label}")
        return sorted(found)

    @property
    def dataset(self) -> RequestDataset:
        """All batches."""
        return RequestDataset(self._plans, self.tokenizer.pad_token_id)

    def metrics(self, responses: Iterable[RequestResponse]) -> dict[str, Measurement]:
        """What the benchmarks came to.

        Args:
            responses: The policy's, of all batches and ranks, in any order.

        Returns:
            By `<task>/<metric>`, as the harness names them; and `mean` over the main metrics.

        Raises:
            UserError: If requests were not answered, or more than once.
        """
        from sdft_lightning.data.benchmarks.harness_model import ResponsePlayer

        given = [0] * len(self.scored)
        sums = [ContinuationScore(0.0, True) for _ in self.scored]
        texts: list[dict[int, str]] = [{} for _ in self.answered]
        for response in responses:
            if response.text is None:
                given[response.request] += 1
                sums[response.request] = _joined(sums[response.request], response.score)
            else:
                texts[response.request][response.copy] = response.text
        self._check_complete(given, [len(copies) for copies in texts])
        player = ResponsePlayer(
            self.tokenizer,
            self.max_length,
            dict(zip(self.scored, sums, strict=True)),
            {
                key: [copies[copy] for copy in sorted(copies)]
                for key, copies in zip(self.answered, texts, strict=True)
            },
        )
        found: dict[str, Measurement] = {}
        for task in self.tasks:
            found.update(self._evaluate(task, player))
        if self.main_metrics:
            found["mean"] = _mean([found[name] for name in self.main_metrics])
        return found

    def _check_complete(self, parts: list[int], copies: list[int]) -> None:
        if parts != self._parts or copies != self._copies:
            wanted, got = sum(self._parts) + sum(self._copies), sum(parts) + sum(copies)
            raise UserError(
                f"data.benchmarks: {got} responses to {wanted} requests came in, each is needed "
                "once. Leave trainer.limit_val_batches and limit_test_batches at 1.0 and use "
                "data.benchmarks.limit instead."
            )

    def _evaluate(self, task: LoadedTask, player: ResponsePlayer) -> dict[str, Measurement]:
        from lm_eval.evaluator import evaluate

        for leaf in task.leaves.values():
            leaf.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples as when it was asked
        settings = task.settings
        with quiet_harness(), seeded_grading(), sandboxed_templates():
            results: Any = evaluate(
                lm=player,
                task_dict=task.loaded,
                limit=self.options.limit_of(settings),
                cache_requests=self.options.cache_requests,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
                log_samples=True,  # for the scores of single items
                system_instruction=settings.system_instruction,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.multiturn,
                confirm_run_unsafe_code=self.options.allow_code_execution,
            )
        return _with_items(_measurements(results), results["samples"], task)


def _joined(first: ContinuationScore, second: ContinuationScore) -> ContinuationScore:
    """The score of two continuations in a row."""
    return ContinuationScore(
        first.log_likelihood + second.log_likelihood, first.is_greedy and second.is_greedy
    )


def _collect(leaf: Any, task: LoadedTask, collector: RequestCollector, options: Benchmarks) -> None:
    from lm_eval.evaluator_utils import get_sample_size

    chat = task.settings.apply_chat_template
    if chat and collector.tokenizer.chat_template is None:
        raise UserError(
            f"data.benchmarks.tasks: {task.settings.name}: apply_chat_template is set, and the "
            "model's tokenizer has no chat template. Leave it out."
        )
    with quiet_harness(), sandboxed_templates(), explained(leaf.config.task, leaf.DATASET_PATH):
        leaf.build_all_requests(
            limit=get_sample_size(leaf, options.limit_of(task.settings)),
            cache_requests=options.cache_requests,
            system_instruction=task.settings.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=task.settings.multiturn,
            chat_template=collector.apply_chat_template if chat else None,
            tokenizer_name=collector.tokenizer_name if chat else "",
        )
    collector.task = leaf.config.task
    by_kind: dict[str, list[Any]] = {}
    for instance in leaf.instances:
        by_kind.setdefault(instance.request_type, []).append(instance)
    for kind, instances in by_kind.items():
        if kind == "loglikelihood":
            collector.loglikelihood(instances, disable_tqdm=True)
        elif kind in ("loglikelihood_rolling", "generate_until"):
            getattr(collector, kind)(instances)
        else:
            raise UserError(
                f"data.benchmarks.tasks: {leaf.config.task} asks for {kind}; supported are "
                "loglikelihood, loglikelihood_rolling and generate_until. Leave it out."
            )


def _check_lengths(requests: dict[RequestKey, list[Part]], max_length: int) -> None:
    for key, parts in requests.items():
        for part in parts:
            if not part.context or not part.continuation:
                raise UserError(
                    f"data.benchmarks: a request cannot be scored: its continuation has "
                    f"{len(part.continuation)} tokens, allowed are 1 to {max_length} for this "
                    f"model: {printable(key, 120)}"
                )


def _main_metrics(tasks: list[LoadedTask], options: Benchmarks) -> list[str]:
    """Which measurements enter the mean."""
    chosen = [(task.name, task.settings.metric) for task in tasks if task.settings.metric]
    if options.mean == "off" or not chosen:
        return []
    metrics = {metric for _, metric in chosen}
    if options.mean == "alike" and len(metrics) > 1:
        listed = ", ".join(f"{metric} of {name}" for name, metric in chosen)
        raise UserError(
            f"data.benchmarks.mean: alike averages metrics of one name only, and these differ: "
            f"{listed}. Set mean to any if you want their average all the same, or to off."
        )
    return [f"{name}/{metric}" for name, metric in chosen]


def _mean(measurements: list[Measurement]) -> Measurement:
    """The plain mean, with the standard error of a mean of independent values."""
    count = len(measurements)
    errors = [m.stderr for m in measurements if m.stderr is not None]
    stderr = None
    if len(errors) == count:
        stderr = math.sqrt(sum(error**2 for error in errors)) / count
    return Measurement(sum(m.value for m in measurements) / count, stderr, count)


def _fingerprint(tasks: list[LoadedTask], options: Benchmarks) -> str:
    """What the mean depends on besides the model: means of other things are not compared."""
    parts = [
        [
            task.name,
            task.settings.metric,
            options.limit_of(task.settings),
            sorted((name, leaf.config.num_fewshot) for name, leaf in task.leaves.items()),
            task.settings.apply_chat_template,
            task.settings.multiturn,
            task.settings.system_instruction,
        ]
        for task in tasks
    ]
    return json.dumps(parts)


def _measurements(results: dict[str, Any]) -> dict[str, Measurement]:
    """The harness's results by `<task>/<metric>`; `,none` (no filter) is left off."""
    found: dict[str, Measurement] = {}
    for name, metrics in results["results"].items():
        samples = results.get("n-samples", {}).get(name, {}).get("effective", 0)
        samples = samples or int(metrics.get("sample_len", metrics.get("sample_count", 0)) or 0)
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            stderr = float(error) if isinstance(error, (int, float)) else None
            label = metric if kind == "none" else key
            found[f"{name}/{label}"] = Measurement(float(value), stderr, samples)
    return found


# Aggregations of pairs of a prediction and an answer, of which no single one has a score.
_OF_PAIRS = ("f1_score", "matthews_corrcoef", "brier_score", "bleu", "chrf", "chrfpp", "ter")
# Aggregations whose items are pairs of a log-likelihood and a number of words or bytes.
_WEIGHTED = ("weighted_perplexity", "bits_per_byte")


def _scores_items(leaf: Any, label: str) -> bool:
    aggregation = leaf.aggregation().get(label.partition(",")[0])
    return getattr(aggregation, "__name__", "") not in _OF_PAIRS


def _with_items(
    measured: dict[str, Measurement], samples: dict[str, list[dict[str, Any]]], task: LoadedTask
) -> dict[str, Measurement]:
    """Add the scores of single items; those of a group's parts stand under the group's name."""
    of_parts = {
        (leaf, label): items
        for leaf, found in task.leaves.items()
        for label, items in _items(samples[leaf], found.aggregation()).items()
    }
    grouped: dict[str, dict[str, Items]] = {}
    for (leaf, label), items in of_parts.items():
        whole = f"{task.name}/{label}"
        if leaf != task.name and whole in measured:
            grouped.setdefault(whole, {})[leaf] = items
        elif f"{leaf}/{label}" in measured:
            name = f"{leaf}/{label}"
            measured[name] = measured[name]._replace(items=items)
    for whole, parts in grouped.items():
        measured[whole] = measured[whole]._replace(items=_joined_items(parts))
    return measured


def _joined_items(parts: dict[str, Items]) -> Items:
    """The items of all parts of a group, `<part>/<item>`."""
    scores: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part, items in parts.items():
        scores |= {f"{part}/{key}": score for key, score in items.scores.items()}
        weights |= {f"{part}/{key}": weight for key, weight in (items.weights or {}).items()}
    content = digest([[part, items.content] for part, items in parts.items()])
    return Items(scores, content, weights or None)


def _items(samples: list[dict[str, Any]], aggregation: dict[str, Any]) -> dict[str, Items]:
    """The scores of a task's items by metric, of all metrics that score single items."""
    found: dict[str, Items] = {}
    for kind in dict.fromkeys(sample["filter"] for sample in samples):
        of_filter = [sample for sample in samples if sample["filter"] == kind]
        content = digest([[each["doc_hash"], each["prompt_hash"]] for each in of_filter])
        for metric in of_filter[0]["metrics"]:
            weighted = getattr(aggregation.get(metric), "__name__", "") in _WEIGHTED
            pairs = {str(each["doc_id"]): _score(each.get(metric), weighted) for each in of_filter}
            scores = {key: pair[0] for key, pair in pairs.items() if pair is not None}
            if len(scores) < len(of_filter):
                continue
            weights = {key: pair[1] for key, pair in pairs.items() if pair is not None}
            label = metric_label(metric, kind)
            found[label] = Items(scores, content, weights if weighted else None)
    return found


def _score(value: Any, weighted: bool) -> tuple[float, float] | None:
    """An item's score and weight, of what the harness keeps of it; None of what is no score."""
    if weighted:
        return (float(value[0]), float(value[1])) if isinstance(value, tuple) else None
    # A list of shares is a score for each part of the item, such as each of its instructions.
    if isinstance(value, list) and value and all(_is_number(x) and 0 <= x <= 1 for x in value):
        return sum(map(float, value)) / len(value), 1.0
    return (float(value), 1.0) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_))
