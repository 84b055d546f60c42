"""SDFT's step with another teacher or another writer: re-invoke, and offline distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.models.tokenization import load_config, load_stop_ids, load_tokenizer
from sdft_lightning.modules.checkpoints import check_same_kind
from sdft_lightning.modules.completions import (
    CompletionTokens,
    KeptCompletions,
    check_completions,
    read_completions,
)
from sdft_lightning.modules.sdft import SDFTModule
from sdft_lightning.rollout import TransformersEngine
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import Demonstration, PromptBatch, Rollout, RowNeeds, Tokens

COMPLETIONS_KEY = "sdft_lightning_completions"
# Completions belong to a row and not to a step: their random numbers are those of this one.
_STEP = 0
# The original model has no default, but --print_config lists its options.
_UNNAMED = Policy(name="")


class ReinvokeModule(SDFTModule):
    """After SFT, the trained student is pulled toward its former self on general prompts.

    - Text: the student answers the bare prompt; rows need no demonstration.
    - Teacher: the original model, frozen, sees the same bare prompt.
    - Compared: both distributions at each token of the answer, by `divergence`.

    Args:
        original: The model before SFT: its name and revision, and attn_implementation if that is
            not the student's. It is loaded whole and in float32, so the rest cannot be given.
        kwargs: `SDFTModule`'s.
    """

    row_needs: ClassVar[RowNeeds] = RowNeeds(demonstration=False, teacher_prompt=False)
    has_preflight: ClassVar[bool] = False

    def __init__(self, *, original: Policy = _UNNAMED, **kwargs: Any) -> None:
        super().__init__(teacher=FrozenTeacher(), generate_from_teacher=False, **kwargs)
        if not original.name:
            raise UserError(
                "model.original.name: ReinvokeModule needs it and it is not given. Name the model "
                "before SFT: `embedded`, a folder written by save_pretrained, or a Hub id."
            )
        taken = ("name", "revision", "attn_implementation")
        for name, given in asdict(original).items():
            if name not in taken and given != getattr(Policy(), name):
                raise UserError(
                    f"model.original.{name}: got {given}; the original model is loaded whole and "
                    f"in float32, and only teaches: it takes {', '.join(taken)}. Leave it out."
                )
        self.original = original

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what the engine cannot sample, and an original that the student cannot come from.

        Raises:
            UserError: If there is no such model, or it has another architecture or tokenizer.
        """
        super().check_before_fit(rows)
        check_same_kind(self.policy, self.original)

    def load_teacher(self) -> None:
        """Take the original model as the teacher."""
        check_same_kind(self.policy, self.original)
        kernel = self.original.attn_implementation or self.policy.attn_implementation
        original = replace(self.original, attn_implementation=kernel)
        # It is of the student's kind, which is checked.
        self.teacher.hold(load_policy(original, check=False).model)

    def teacher_prompts(self, batch: PromptBatch) -> Tokens:
        """The bare prompts `(B, P)`: there is no demonstration."""
        return batch.prompts


class OfflineDistillationModule(SDFTModule):
    """SDFT's loss on text that was written once for each row; not on-policy.

    - Text: the teacher writes each row's completion once, or a file gives it.
    - Teacher: the model as it was before training, and sees the demonstration.
    - Compared: both distributions at each token of that text, by `divergence`.

    Args:
        completions: A JSON Lines file of completions instead of the teacher's, `{id, completion}`
            with the ids of the training rows; a predictions.jsonl is such a file.
        cache_prompts: Keep the keys and values of every teacher prompt in memory, see
            FrozenTeacher.
        kwargs: `SDFTModule`'s.
    """

    has_preflight: ClassVar[bool] = False
    other_writer: ClassVar[str] = (
        "OfflineDistillationModule trains on what the teacher wrote, or model.completions holds"
    )

    def __init__(
        self, *, completions: str | None = None, cache_prompts: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(
            teacher=FrozenTeacher(cache_prompts),
            generate_from_teacher=True,
            engine=TransformersEngine(),
            mismatch=Mismatch(),
            **kwargs,
        )
        self.completions = completions
        self.kept = KeptCompletions()

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Take the completions that are given, if any, and refuse a file that lacks some rows.

        Raises:
            UserError: Names the row, or the line that has another form.
        """
        super().check_before_fit(rows)
        if self.completions is None:
            return
        policy = self.policy
        tokenizer = load_tokenizer(policy.name, policy.revision)
        target = CompletionTokens(
            tokenizer,
            load_stop_ids(policy.name, tokenizer, policy.revision),
            load_config(policy.name, policy.revision).vocab_size,
            self.sampling.max_new_tokens,
        )
        given = read_completions(self.completions, target)
        self._check_given(given, rows, self.completions)
        for row_id, completions in given.items():
            self.kept.put(row_id, completions)

    def _check_given(self, given: Any, rows: Sequence[Demonstration], file: str) -> None:
        check_completions(given, rows, self.sampling.completions_per_prompt, file)

    def on_fit_start(self) -> None:
        """Gather a spread teacher: later one process may have texts to write, another none."""
        super().on_fit_start()
        if is_sharded(self.student) and self.completions is None:
            self.gather_teacher()

    def sample_rollouts(self, batches: list[PromptBatch], step: int) -> list[Rollout]:
        """The kept completions of several micro-batches; the teacher writes what is not there."""
        missing = [part for part in map(self.kept.missing, batches) if part.rows]
        if missing:
            if self.completions is not None:
                self._check_given({}, missing[0].rows, self.completions)
            written = super().sample_rollouts(missing, _STEP)
            for part, rollout in zip(missing, written, strict=True):
                self.kept.put_rollout([row.id for row in part.rows], rollout)
        pad_id = self.tokenizer.pad_token_id
        return [
            self.kept.rollout([row.id for row in batch.rows], pad_id, batch.prompt_ids.device)
            for batch in batches
        ]

    def on_train_epoch_end(self) -> None:
        """From here on rows go to other ranks, which take their completions over."""
        self.kept.share()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the teacher wrote, on all ranks."""
        super().on_save_checkpoint(checkpoint)
        self.kept.share()
        written = self.kept if self.completions is None else KeptCompletions()
        checkpoint[COMPLETIONS_KEY] = written.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved completions, unless a file gives them."""
        super().on_load_checkpoint(checkpoint)
        if self.completions is None:
            self.kept.load(checkpoint[COMPLETIONS_KEY])
