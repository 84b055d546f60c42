"""The records that travel between the rooms, and the letters of their dimensions.

B batch (rows), P prompt, Q teacher prompt, T completion, V vocabulary, D hidden, N tokens kept.
Masks are boolean, true = keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getattr_static
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Message = dict[str, Any]


class Tokens(NamedTuple):
    """Token ids of some rows, padded on one side, with the mask of those that are no padding.

    Attributes:
        ids: `(B, L)`.
        mask: `(B, L)` boolean.
    """

    ids: Tensor
    mask: Tensor

    def rows(self, which: Any) -> Tokens:
        """Some of the rows: a slice, or indices `(A,)`."""
        return Tokens(self.ids[which], self.mask[which])

    def to(self, device: Any) -> Tokens:
        """The same on a device."""
        return Tokens(self.ids.to(device), self.mask.to(device))

    def repeat(self, times: int) -> Tokens:
        """Each row so many times, next to itself."""
        if times == 1:
            return self
        return Tokens(*(each.repeat_interleave(times, dim=0) for each in self))

    def lists(self) -> list[list[int]]:
        """The tokens of each row without padding."""
        return [row[kept].tolist() for row, kept in zip(self.ids, self.mask, strict=True)]


class Demonstration(NamedTuple):
    """One row of a data set: a question and the expert's answer to it.

    Attributes:
        id: Unique within its file; completions are sampled from random numbers that belong to it.
        prompt: Chat messages up to and including the last user turn.
        demonstration: The expert's answer as chat messages; empty where only a grade is wanted.
        context: Source text that the teacher may read, if any.
        reference: What the grader compares with, if any.
        origin: `file, row n`, for messages to the user.
    """

    id: str
    prompt: list[Message]
    demonstration: list[Message]
    context: str | None
    reference: Any
    origin: str


class RowNeeds(NamedTuple):
    """What a method needs of every training row.

    Attributes:
        prompt: A question.
        demonstration: The expert's answer; where it is not needed, it is not looked at either.
        context: A source text, which is then what is trained on.
        target: The demonstration is what is predicted, so it holds the assistant's words only.
        teacher_prompt: The question is also shown with its demonstration.
    """

    prompt: bool = True
    demonstration: bool = True
    context: bool = False
    target: bool = False
    teacher_prompt: bool = True


class RowLengths(NamedTuple):
    """Tokens of the longest texts of some rows; each may be of another row."""

    prompt: int = 0
    teacher_prompt: int = 0
    demonstration: int = 0
    context: int = 0


class PromptBatch(NamedTuple):
    """Tokenized prompts of both roles for B rows, and the demonstration as a target.

    Attributes:
        prompt_ids: `(B, P)` student prompts, padded on the left.
        prompt_mask: `(B, P)`.
        teacher_prompt_ids: `(B, Q)` teacher prompts, padded on the left; nothing but padding where
            a row has no demonstration.
        teacher_prompt_mask: `(B, Q)`.
        demonstration_ids: `(B, T)` tokens of the demonstration with its stop token, padded on the
            right.
        demonstration_mask: `(B, T)`.
        context_ids: `(B, S)` tokens of the context as plain text, padded on the right; S = 0 but
            for methods that train on it, for which P = Q = T = 0.
        context_mask: `(B, S)`.
        rows: The B rows themselves.
        task: Name of the data set that the rows belong to.
        grader: Name of the grader for `task`; empty where nothing is graded.
        window: The later micro-batches of the accumulation window, on its first.
        retained: Bare prompts whose answers are to stay as they were before training; None
            without any. They count as rows of the micro-batch beside the B.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    teacher_prompt_ids: Tensor
    teacher_prompt_mask: Tensor
    demonstration_ids: Tensor
    demonstration_mask: Tensor
    context_ids: Tensor
    context_mask: Tensor
    rows: list[Demonstration]
    task: str
    grader: str
    window: list[PromptBatch]
    retained: PromptBatch | None = None

    @property
    def prompts(self) -> Tokens:
        """The student's prompts."""
        return Tokens(self.prompt_ids, self.prompt_mask)

    @property
    def teacher_prompts(self) -> Tokens:
        """The teacher's prompts."""
        return Tokens(self.teacher_prompt_ids, self.teacher_prompt_mask)

    @property
    def demonstrations(self) -> Tokens:
        """The demonstrations as targets."""
        return Tokens(self.demonstration_ids, self.demonstration_mask)

    @property
    def contexts(self) -> Tokens:
        """The contexts as plain text."""
        return Tokens(self.context_ids, self.context_mask)


class ScoringBatch(NamedTuple):
    """Continuations whose log-likelihood after their contexts is asked for.

    C contexts, R continuations; several continuations may follow one context.

    Attributes:
        context_ids: `(C, P)`, padded on the left; every context has at least one token.
        context_mask: `(C, P)`.
        continuation_ids: `(R, T)`, padded on the right; every one has at least one token.
        continuation_mask: `(R, T)`.
        owner: `(R,)` which context each continuation follows.
        requests: Index of the request that each continuation belongs to; the parts of a long text
            share one.
    """

    context_ids: Tensor
    context_mask: Tensor
    continuation_ids: Tensor
    continuation_mask: Tensor
    owner: Tensor
    requests: list[int]

    @property
    def contexts(self) -> Tokens:
        """What the continuations follow."""
        return Tokens(self.context_ids, self.context_mask)

    @property
    def continuations(self) -> Tokens:
        """What is scored."""
        return Tokens(self.continuation_ids, self.continuation_mask)


class GenerationSettings(NamedTuple):
    """How a benchmark wants its answers sampled.

    Attributes:
        stop: Texts of which the first that appears ends an answer and is cut off.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Keep the likeliest tokens that together reach this probability.
        top_k: Keep the k likeliest tokens; 0 keeps all.
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class GenerationBatch(NamedTuple):
    """Prompts of a benchmark that want an answer.

    Attributes:
        prompt_ids: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)`.
        settings: How the answers are sampled.
        requests: Index of the request of each row.
        copies: Which of several answers to the same request each row is.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    settings: GenerationSettings
    requests: list[int]
    copies: list[int]

    @property
    def prompts(self) -> Tokens:
        """What is to be answered."""
        return Tokens(self.prompt_ids, self.prompt_mask)


class ContinuationScore(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy sampling would have given it."""

    log_likelihood: float
    is_greedy: bool


class RequestResponse(NamedTuple):
    """What the policy answered to a request of a benchmark.

    Attributes:
        request: Index of the request among those of its kind.
        copy: Which of several answers this is.
        score: Of a continuation; zero for an answer in words.
        text: The answer; None for a continuation.
    """

    request: int
    copy: int
    score: ContinuationScore
    text: str | None


class Items(NamedTuple):
    """The scores of single items, under one metric of one set.

    Attributes:
        scores: By the item's id: 0 or 1, a fraction, or for perplexities the item's log-likelihood
            in nats; NaN where there is none (a judge gave no verdict).
        content: Digest of all that was asked; scores of other content cannot be compared.
        weights: For perplexities: by id, the words or bytes that the log-likelihood is of.
    """

    scores: dict[str, float]
    content: str
    weights: dict[str, float] | None = None


class Measurement(NamedTuple):
    """What a benchmark came to.

    Attributes:
        value: The metric.
        stderr: Its standard error; None where the harness gives none.
        samples: Items that it is the mean of.
        items: Their scores; None where single items have none (F1, BLEU), and for the parts of a
            group, whose items stand with the group.
    """

    value: float
    stderr: float | None
    samples: int
    items: Items | None = None


class Rollout(NamedTuple):
    """Completions of R = B · completions_per_prompt rows; row `b · n + j` is sample j of prompt b.

    Attributes:
        completion_ids: `(R, T)`, padded on the right.
        completion_mask: `(R, T)`, true up to and including the first stop token.
        sampled_log_probs: `(R, T)` float32, log-probability of each token under the policy at the
            sampling temperature, before top-k, top-p and min-p; zero outside the mask.
        truncated: `(R,)`, true where no stop token was sampled in time.
    """

    completion_ids: Tensor
    completion_mask: Tensor
    sampled_log_probs: Tensor
    truncated: Tensor

    @property
    def completions(self) -> Tokens:
        """The completions with their mask."""
        return Tokens(self.completion_ids, self.completion_mask)


class OutputHead(NamedTuple):
    """What turns hidden states into logits: `cap · tanh((h Wᵀ + b) · scale / cap)`.

    Attributes:
        weight: `(V, D)`; the embedding itself where the model ties them.
        bias: `(V,)` or None.
        scale: Factor on the logits (Cohere, Granite); 1 for most models.
        softcap: Bound of the soft cap (Gemma 2); None for most models.
        rounded: The weight in the dtype of the products, where there is a copy; it is cast without.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    rounded: Tensor | None = None


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells about each of N tokens; float32, without gradient.

    Attributes:
        divergence: `(N,)` the divergence that is trained on, in nats.
        kl: `(N,)` KL(teacher ‖ student), whatever is trained on.
        student_entropy: `(N,)` in nats.
        teacher_entropy: `(N,)` in nats.
        top1_agreement: `(N,)` 1 where both put the same token first.
        student_log_probs: `(N,)` of the sampled token.
        teacher_log_probs: `(N,)` of the sampled token.
    """

    divergence: Tensor
    kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor


class TaskData(Protocol):
    """What a module and its callbacks may ask of a data module, after its `setup`.

    A data module that subclasses it offers only what it has; the rest are the values here.

    Attributes:
        benchmark_suite: The benchmarks that are measured; None without any.
        grade_thoughts: Whether graders also get the thoughts of an answer.
        held_out: Graded sets beside the task, by name.
        batch_size: Prompts of a training micro-batch on one device.
        eval_batch_size: Questions that are answered at once in validation.
        retained_new_tokens: Longest answer to a row to retain; 0 where there are no such rows.
        retains_evenly: Whether every process has as many of these rows in each micro-batch.
    """

    benchmark_suite: Any = None
    grade_thoughts: bool = False
    held_out: Mapping[str, Any] = MappingProxyType({})
    batch_size: int = 1
    eval_batch_size: int = 1
    retained_new_tokens: int = 0
    retains_evenly: bool = True

    @property
    def judge(self) -> Any:
        """Who is asked by the graders that ask a judge; None where none does."""
        return None

    @property
    def batches_per_epoch(self) -> int | None:
        """Training micro-batches of an epoch on this rank; None where nobody knows."""
        return None

    def training_rows(self) -> list[Demonstration]:
        """The training rows that fit, after `setup("fit")`."""
        return []

    @property
    def longest_rows(self) -> RowLengths:
        """The longest texts of the training rows that fit, after `setup("fit")`."""
        return RowLengths()

    def graded(self, command: str) -> dict[str, bool]:
        """The tasks whose answers a command grades.

        Args:
            command: validate or test; validate stands for the validations of a fit, too.

        Returns:
            By name, whether any of its questions comes with a demonstration.
        """
        return {}

    def check_model_takes(self, new_tokens: int, eval_new_tokens: int) -> None:
        """Refuse, or warn of, rows that leave the model no room for a completion.

        Args:
            new_tokens: Longest completion of a training prompt; 0 where none are sampled.
            eval_new_tokens: Longest answer to a question that is graded.

        Raises:
            UserError: Names the longest row.
        """
        return


_ASKED = tuple(name for name in vars(TaskData) if not name.startswith("_"))


def task_data(trainer: Any) -> TaskData | None:
    """The data module of a trainer, where it answers what modules ask; None for any other.

    Args:
        trainer: Who carries out a command; None without one.
    """
    data: Any = getattr(trainer, "datamodule", None)
    missing = object()  # nothing is computed: what a property says is known after `setup` only
    if any(getattr_static(data, name, missing) is missing for name in _ASKED):
        return None
    found: TaskData = data
    return found
