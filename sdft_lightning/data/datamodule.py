"""Demonstrations as a LightningDataModule."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from sdft_lightning.data.batches import (
    PromptDataset,
    Retained,
    WindowSampler,
    check_rows_for_all,
    collate,
    rows_left_out,
)
from sdft_lightning.data.benchmark_data import (
    BenchmarkDataModule,
    ModelDataModule,
    ModelVersion,
    ResumableLoader,
)
from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite
from sdft_lightning.data.json_rows import MAX_MEGABYTES
from sdft_lightning.data.prompts import PromptStyle, check_headers
from sdft_lightning.data.rows import (
    Columns,
    check_prompts,
    columns_of_questions,
    compose,
    parse_rows,
    wanted_columns,
)
from sdft_lightning.data.sets import HeldOut, PlannedSet, TaskSets, gold_report, set_warnings
from sdft_lightning.data.sources import Source, read_rows
from sdft_lightning.data.tokenize import (
    Lengths,
    Tokenizer,
    check_model_takes,
    length_report,
    tokenize_rows,
)
from sdft_lightning.errors import UserError, check_at_least, harmless
from sdft_lightning.graders import JUDGED, Judge, JudgeSettings, check_reference
from sdft_lightning.models.chat_template import known_thoughts
from sdft_lightning.models.embedded import cache_folder
from sdft_lightning.models.tokenization import (
    has_rotary_positions,
    load_max_length,
    load_stop_ids,
    load_tokenizer,
    vocabulary_size,
)
from sdft_lightning.types import Demonstration, PromptBatch, RowLengths, RowNeeds

log = logging.getLogger(__name__)

MOST_RETAINED_TOKENS = 2**20  # as in model.sampling


class DemonstrationDataModule(ModelDataModule):
    """Demonstrations for training, and graded questions for validation and test.

    Args:
        model_name: The model whose tokenizer is used; that of the module that is trained without
            it. The command line sets it from model.policy.name.
        revision: Its branch, tag or commit on the Hub; the module's without it.
        train: Demonstrations: a .jsonl, .json or .parquet file, a save_to_disk folder,
            `example:<name>/<file>`, hub:<owner>/<name>:<split>, or {repo, split} with more options.
        validation: Questions that are answered and graded during training; as train.
        test: Questions for the test command; as train.
        predict: Questions for the predict command; as train, grades and demonstrations not needed.
        retain: Prompts whose answers training must not change, without demonstrations; as train.
            The student answers them, and is held to what it would have said before training.
        retain_share: Their part of every batch; the batch keeps its size.
        retain_max_new_tokens: Longest answer to one of them; long enough that most end, or the
            model learns not to end.
        obtain: How to get the files of the four; told where one is needed and not given.
        name: Name of the task in logs: val/task/<name>/accuracy.
        grader: How completions are graded: contains, exact, choice, token_f1, tool_call (strict),
            tool_call_released (as the paper's code), or by a judge: medical, knowledge,
            knowledge_lenient; or package.module.function, yours. Nothing is graded without one.
        judge: The model that the graders medical, knowledge and knowledge_lenient ask.
        held_out: Further graded sets by name, validated and tested beside the task.
        benchmarks: Tasks of lm-evaluation-harness, validated and tested beside them.
        columns: Which column holds what.
        prompts: How the teacher is shown the demonstration.
        lengths: What fits, and what happens to rows that do not.
        batch_size: Prompts of a micro-batch on one device; times accumulate_grad_batches and
            devices are the prompts of an optimizer step.
        eval_batch_size: Prompts of a validation batch.
        grade_thoughts: Give graders also the thoughts (<think>…</think>) of an answer, which they
            are spared else.
        num_workers: Processes that collate batches.
        max_megabytes: Most memory for the rows of a set as they are read; a larger set is refused.
        seed: Seed of the order of rows; set from seed_everything.
    """

    def __init__(
        self,
        model_name: str | None = None,
        revision: str | None = None,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        retain: Source | None = None,
        retain_share: float = 1 / 3,
        retain_max_new_tokens: int = 512,
        obtain: str | None = None,
        name: str = "task",
        grader: str | None = None,
        judge: JudgeSettings = JudgeSettings(),  # noqa: B008 - frozen
        held_out: dict[str, HeldOut] | None = None,
        benchmarks: Benchmarks = Benchmarks(),  # noqa: B008 - frozen
        columns: Columns = Columns(),  # noqa: B008 - frozen
        prompts: PromptStyle = PromptStyle(),  # noqa: B008 - frozen
        lengths: Lengths = Lengths(),  # noqa: B008 - frozen
        batch_size: int = 8,
        eval_batch_size: int = 32,
        grade_thoughts: bool = False,
        num_workers: int = 0,
        max_megabytes: int = MAX_MEGABYTES,
        seed: int = 42,
    ) -> None:
        super().__init__(model_name, revision, num_workers)
        self.grader: str | None = grader
        self.held_out = dict(held_out or {})
        sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        sources["retain"] = retain if retain_share else None
        self._task_sets = TaskSets(name, sources, columns, grader, self.held_out, obtain)
        self.judge_settings = judge
        self.benchmark_data = BenchmarkDataModule(model_name, revision, benchmarks, num_workers)
        self.retain_share = retain_share
        self.retain_max_new_tokens = retain_max_new_tokens
        self.prompts = prompts
        self.lengths = lengths
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.grade_thoughts = grade_thoughts
        self.max_megabytes = max_megabytes
        self.seed = seed
        self._sets: dict[str, PromptDataset] = {}
        self._planned: dict[str, PlannedSet] = {}  # what each of them was made from
        self._tokenized_for: ModelVersion | None = None
        self._left_out: dict[str, int] = {}
        self._counts_too_long = False  # see `for_preflight`
        self.too_long: list[str] = []
        self._tokenizer: Tokenizer | None = None
        self._pad_id = 0
        for name in ("batch_size", "eval_batch_size", "max_megabytes", "retain_max_new_tokens"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
        if retain_max_new_tokens > MOST_RETAINED_TOKENS:
            raise UserError(
                f"data.retain_max_new_tokens: got {retain_max_new_tokens}, allowed are at most "
                f"{MOST_RETAINED_TOKENS}."
            )
        if not 0 <= retain_share < 1:
            raise UserError(
                f"data.retain_share: got {retain_share}, allowed are 0 and more, below 1: the part "
                "of a batch whose rows are of data.retain."
            )
        self._task_sets.check(judge)

    @contextmanager
    def for_preflight(self) -> Iterator[None]:
        """Count the rows at which a fit would stop as too long, and leave the benchmarks out.

        Afterwards all is as before, and a fit reads its rows anew.
        """
        benchmarks = self.benchmark_data.benchmarks
        self._counts_too_long = True
        self.benchmark_data.benchmarks = Benchmarks()
        self._forget_sets()
        try:
            yield
        finally:
            self._counts_too_long = False
            self.benchmark_data.benchmarks = benchmarks
            self._forget_sets()

    def _forget_sets(self) -> None:
        self._sets, self._planned, self.too_long = {}, {}, []

    @property
    def benchmarks(self) -> Benchmarks:
        """Which benchmarks are measured beside the rows, and how."""
        return self.benchmark_data.benchmarks

    @property
    def benchmark_suite(self) -> BenchmarkSuite | None:
        """Their tasks with their requests, after `setup`; None without tasks."""
        return self.benchmark_data.benchmark_suite

    def setup(self, stage: str) -> None:
        """Read, check, render and tokenize what a stage needs; report the lengths.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            UserError: If a file, a row or an option is wrong.
        """
        stage = getattr(stage, "value", stage)  # Lightning passes an enum
        name, revision = version = self.model_version
        if version != self._tokenized_for:
            self._forget_sets()
            self._tokenized_for = version
        if stage != "predict":
            self.benchmark_data.trainer = self.trainer
            self.benchmark_data.load(stage)
        module = getattr(self.trainer, "lightning_module", None)
        needs: RowNeeds = getattr(module, "row_needs", RowNeeds())
        needed = self._task_sets.needed(stage, bool(self.benchmarks.tasks), needs)
        # Another method may need more of the same rows.
        sets = [planned for planned in needed if self._planned.get(planned.key) != planned]
        if not sets:
            return
        raw = load_tokenizer(name, revision)
        self._pad_id = raw.pad_token_id
        stops = load_stop_ids(name, raw, revision)
        size = vocabulary_size(name, revision)
        self._tokenizer = tokenizer = Tokenizer(
            raw, self.prompts, self.lengths, stops, vocabulary=size
        )
        for planned in sets:
            self._sets[planned.key] = self._load(planned, tokenizer)
            self._planned[planned.key] = planned
            if planned.key != "train":
                rows, processes = len(self._sets[planned.key]), self._world_size
                check_rows_for_all(f"data.{planned.key}", planned.source, rows, processes)
        if stage == "fit":
            sampler = self._train_sampler()  # refuses fewer rows than one batch
            left_out = rows_left_out(sampler)
            if left_out is not None:
                log.warning(left_out)

    @cached_property
    def judge(self) -> Judge | None:
        """Who the graders that ask a judge ask; None where no set has such a grader."""
        graders = [self.grader, *(held.grader for held in self.held_out.values())]
        if not any(grader in JUDGED for grader in graders):
            return None
        folder = self.judge_settings.cache or cache_folder() / "judge"
        return Judge(self.judge_settings, Path(folder))

    def _load(self, planned: PlannedSet, tokenizer: Tokenizer) -> PromptDataset:
        wanted = wanted_columns(planned.columns)
        found = read_rows(planned.source, f"data.{planned.key}", wanted, self.max_megabytes)
        found = compose(found, planned.columns)
        check = None if planned.grader is None else partial(check_reference, planned.grader)
        columns, option = planned.columns, "data.columns"
        if planned.key in ("predict", "retain"):
            columns = columns_of_questions(found, columns)
        if planned.key == "retain":
            check_prompts(found, "data.retain")
        elif planned.key.startswith("held_out"):
            option = f"data.{planned.key}.columns"
        rows = parse_rows(found, columns, planned.needs, check, option)
        if planned.key == "retain":  # random numbers and kept completions go by id
            rows = [row._replace(id=f"retain/{row.id}") for row in rows]
        found = found._replace(rows=[], places=[])  # from here on they take memory for nothing
        if planned.grader is not None:
            markers = [] if self.grade_thoughts else known_thoughts(tokenizer.tokenizer)
            line = gold_report(planned.key, planned.grader, rows, self.judge, markers)
            if line:
                log.info(harmless(line))
        if not planned.is_taught:
            rows = [row._replace(demonstration=[]) for row in rows]
        check_headers(tokenizer.tokenizer, rows, planned.prompts or self.prompts, planned.needs)
        tokenizer = tokenizer._replace(
            style=planned.prompts or tokenizer.style,
            lengths=planned.lengths or tokenizer.lengths,
            needs=planned.needs,
        )
        tokenized = tokenize_rows(rows, tokenizer, self._counts_too_long)
        self._left_out[planned.key] = tokenized.skipped + tokenized.truncated
        if tokenized.first_too_long and tokenizer.lengths.too_long == "error":
            self._left_out[planned.key] = 0  # a fit leaves none out: it stops
            self.too_long.append(
                f"data.{planned.key}: {tokenized.skipped} of {len(rows)} rows do not fit, and "
                f"`fit` stops there. The first: {tokenized.first_too_long}"
            )
        log.info(harmless(f"{length_report(planned.key, tokenized)}; from {found.name}"))
        for warning in set_warnings(planned, tokenized, len(rows), tokenizer):
            log.warning(harmless(warning))
        return PromptDataset(tokenized.rows, self._pad_id, planned.task, planned.grader or "")

    def training_rows(self) -> list[Demonstration]:
        """The training rows that fit, after `setup("fit")`."""
        return self._sets["train"].rows.demonstrations

    def graded(self, command: str) -> dict[str, bool]:
        """The tasks whose answers a command grades, after `setup`.

        Args:
            command: validate or test; validate stands for the validations of a fit, too.

        Returns:
            By name, whether any of its questions comes with a demonstration.
        """
        keys = ["test" if command == "test" else "validation"]
        keys += [f"held_out.{name}" for name in self.held_out]
        return {
            each.task: any(bool(row.row.demonstration) for row in each.rows)
            for each in (self._sets[key] for key in keys if key in self._sets)
            if each.grader
        }

    def check_training_references(self) -> None:
        """Refuse a training row whose reference the grader does not take, after `setup("fit")`.

        A fit does not grade its training rows, `preflight` does; rows without one are left out.

        Raises:
            UserError: Names the row.
        """
        for row in self.training_rows():
            if self.grader is not None and row.reference is not None:
                check_reference(self.grader, row.reference, row.origin)

    def training_lengths(self) -> tuple[int, int, int, int]:
        """Longest prompt, teacher prompt and demonstration in tokens, and rows left out or cut."""
        longest = self.longest_rows
        return *longest[:3], self._left_out["train"]

    @property
    def longest_rows(self) -> RowLengths:
        """The longest texts of the training rows that fit, in tokens; 0 without such rows."""
        lengths = self._sets["train"].rows.lengths() if "train" in self._sets else []
        return RowLengths(*map(max, zip(*lengths, strict=True))) if lengths else RowLengths()

    def check_model_takes(self, new_tokens: int, eval_new_tokens: int) -> None:
        """Refuse or tell what has no room in the model, after `setup`.

        Args:
            new_tokens: Longest completion of a training prompt; 0 where none are sampled.
            eval_new_tokens: Longest answer to a question that is graded.

        Raises:
            UserError: Names the longest row.
        """
        if not self._sets or self._counts_too_long:
            return
        assert self._tokenizer is not None
        name, revision = self.model_version
        limit = load_max_length(name, self._tokenizer.tokenizer, revision)
        longer_works = has_rotary_positions(name, revision)
        for key, rows in self._sets.items():
            count, by = eval_new_tokens, "model.evaluation.max_new_tokens"
            if key == "train":
                count, by = new_tokens, "model.sampling.max_new_tokens"
            elif key == "retain":
                count, by = self.retain_max_new_tokens, "data.retain_max_new_tokens"
            warning = check_model_takes(rows.rows, limit, count, by, longer_works)
            if warning is not None:
                log.warning(harmless(warning))

    def batch_of(self, rows: Sequence[Demonstration]) -> PromptBatch:
        """Rows rendered, tokenized and padded as training rows are, whatever their lengths."""
        assert self._tokenizer is not None
        return collate([self._tokenizer(row) for row in rows], self._pad_id, self._task_sets.task)

    @property
    def batches_per_epoch(self) -> int:
        """Training micro-batches of an epoch on this rank; known without starting workers."""
        return len(self._train_sampler())

    def _train_sampler(self) -> WindowSampler:
        trainer = self.trainer
        return WindowSampler(
            len(self._sets["train"]),
            self.batch_size,
            trainer.accumulate_grad_batches if trainer else 1,
            self.seed,
            trainer.global_rank if trainer else 0,
            self._world_size,
            (lambda: trainer.current_epoch) if trainer else None,
            Retained(len(self._sets.get("retain", ())), self.retain_share),
        )

    @property
    def retains_evenly(self) -> bool:  # type: ignore[override] # known when rows are read
        """Whether every process has as many rows to retain in each micro-batch."""
        return (self.batch_size * Retained(1, self.retain_share).exact_share) % 1 == 0

    @property
    def retained_new_tokens(self) -> int:  # type: ignore[override] # known when rows are read
        """Longest answer to a row to retain, after `setup`; 0 where there are no such rows."""
        return self.retain_max_new_tokens if "retain" in self._sets else 0

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled micro-batches in accumulation windows."""
        self._sets["train"].retained = self._sets.get("retain")
        return ResumableLoader(
            self._sets["train"],
            self._train_sampler(),
            self._position,
            {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0},
        )

    def _position(self) -> tuple[int, int]:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return self.trainer.current_epoch, progress.processed

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The validation split, each held-out set, then the benchmarks."""
        return self._eval_loaders("validation")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The test split, each held-out set, then the benchmarks."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """The questions to answer."""
        return self.evaluation_loader(self._sets["predict"], self.eval_batch_size)

    def _eval_loaders(self, split: str) -> list[DataLoader[Any]]:
        keys = [split, *(f"held_out.{name}" for name in self.held_out)]
        sets = [self._sets[key] for key in keys if key in self._sets]
        loaders = [self.evaluation_loader(rows, self.eval_batch_size) for rows in sets]
        return loaders + self.benchmark_data.loaders()
