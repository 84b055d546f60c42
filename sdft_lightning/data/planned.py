"""Which sets a stage needs, and which options of them cannot be right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.rows import Columns
from sdft_lightning.data.sources import Source
from sdft_lightning.data.tokenize import Lengths
from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.graders import JUDGED, JudgeSettings, get_grader, grader_names
from sdft_lightning.types import RowNeeds

_SPLITS = {
    "fit": ["train", "validation"],
    "validate": ["validation"],
    "test": ["test"],
    "predict": ["predict"],
}


@dataclass(frozen=True)
class HeldOut:
    """A further set of graded questions: an ability that training must not lose.

    Args:
        source: File or Hub data set.
        grader: Name of its grader.
        columns: Its column map.
        prompts: How its questions are rendered; as data.prompts without it.
        lengths: What of it fits; as data.lengths without it.
    """

    source: Source
    grader: str
    columns: Columns = field(default_factory=lambda: Columns(reference="reference"))
    prompts: PromptStyle | None = None
    lengths: Lengths | None = None


class PlannedSet(NamedTuple):
    """A set that a stage needs: where it is, what it is called, what it holds, how it is graded.

    Prompts and lengths are None where those of the task stand.
    """

    key: str
    task: str
    source: Source
    columns: Columns
    needs: RowNeeds
    grader: str | None
    prompts: PromptStyle | None = None
    lengths: Lengths | None = None

    @property
    def is_taught(self) -> bool:
        """Whether demonstrations matter, or only the bare question (or the context)."""
        if self.key == "train":
            return self.needs.demonstration
        return self.key != "predict" and not self.key.startswith("held_out")


class TaskSets(NamedTuple):
    """The sets of the data options.

    Attributes:
        task: Name of the task.
        sources: Of train, validation, test and predict.
        columns: Their column map.
        grader: Their grader.
        held_out: Further graded sets by name.
        obtain: How to get the files of the task, for messages.
    """

    task: str
    sources: Mapping[str, Source | None]
    columns: Columns
    grader: str | None
    held_out: Mapping[str, HeldOut]
    obtain: str | None = None

    def check(self, judge: JudgeSettings) -> None:
        """Refuse a grader that is not there, or has no judge, and a name that is taken.

        Raises:
            UserError: Names the option.
        """
        graders = {"data.grader": self.grader}
        for name, held in self.held_out.items():
            graders[f"data.held_out.{name}.grader"] = held.grader
        for option, grader in graders.items():
            if grader is None:
                continue
            check_choice(option, grader, grader_names())
            if grader in JUDGED and not judge.model:
                get_grader(grader)  # says what is missing
        odd = next((name for name in self.held_out if not name or not name.isprintable()), None)
        if odd is not None:
            raise UserError(
                f"data.held_out: got the name {odd[:80]!r}; allowed are names of printable "
                "characters, as figures have it in theirs. Give another."
            )
        if self.task in self.held_out:
            raise UserError(
                f"data.held_out: the name {self.task} is the task's own; choose another."
            )

    def needed(self, stage: str, benchmarks: bool, training_needs: RowNeeds) -> list[PlannedSet]:
        """The sets that a stage needs.

        Args:
            stage: fit, validate, test or predict.
            benchmarks: Whether there are benchmarks; with them, or with held-out sets, `validate`
                and `test` have something to do without a set of their own.
            training_needs: What every row to train on must have.

        Raises:
            UserError: If the stage's own set is not given.
        """
        splits = _SPLITS[stage]
        others = stage in ("validate", "test") and (benchmarks or bool(self.held_out))
        if self.sources[splits[0]] is None and not others:
            raise UserError(
                f"data.{splits[0]}: `{stage}` needs it and it is not given. Set it to a file, e.g. "
                f"--data.{splits[0]}=my/{splits[0]}.jsonl. {self.obtain or ''}".rstrip()
            )
        sets: list[PlannedSet] = []
        shown = training_needs.teacher_prompt
        graded = RowNeeds(demonstration=False, teacher_prompt=shown)
        for split in splits:
            source = self.sources[split]
            grader = self.grader if split in ("validation", "test") else None
            needs = training_needs if split == "train" else graded
            if source is not None:
                sets.append(PlannedSet(split, self.task, source, self.columns, needs, grader))
        if stage != "predict":
            sets.extend(
                PlannedSet(
                    f"held_out.{name}",
                    name,
                    held.source,
                    held.columns,
                    graded,
                    held.grader,
                    held.prompts,
                    held.lengths,
                )
                for name, held in self.held_out.items()
            )
        return sets
