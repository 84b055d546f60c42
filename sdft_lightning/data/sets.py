"""Which sets a stage needs, what cannot be right of them, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sdft_lightning.data.prompts import PromptStyle, demonstration_text
from sdft_lightning.data.rows import Columns
from sdft_lightning.data.sources import Source
from sdft_lightning.data.tokenize import Lengths, TokenizedRows, Tokenizer
from sdft_lightning.data.tokens import ControlTokens, stored
from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.graders import (
    JUDGED,
    GoldSelfTest,
    Judge,
    JudgeSettings,
    get_grader,
    gold_self_test,
    gold_text,
    grader_names,
    is_dotted,
    judged_answers,
)
from sdft_lightning.models.chat_template import Markers, without_thoughts
from sdft_lightning.types import Demonstration, RowNeeds

_SPLITS = {
    "fit": ["train", "retain", "validation"],
    "validate": ["validation"],
    "test": ["test"],
    "predict": ["predict"],
}
BARE_PROMPT = RowNeeds(demonstration=False, teacher_prompt=False)


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
        return self.key not in ("predict", "retain") and not self.key.startswith("held_out")


class TaskSets(NamedTuple):
    """The sets of the data options.

    Attributes:
        task: Name of the task.
        sources: Of train, validation, test and predict, and of the rows to retain.
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
            if is_dotted(grader):
                get_grader(grader)  # is imported, or refused
            else:
                remedy = "Choose one, or give package.module.function, a function of yours."
                check_choice(option, grader, grader_names(), remedy)
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
        of_split = {"train": training_needs, "retain": BARE_PROMPT}
        for split in splits:
            source = self.sources[split]
            grader = self.grader if split in ("validation", "test") else None
            needs = of_split.get(split, graded)
            columns = Columns() if split == "retain" else self.columns
            if source is not None:
                sets.append(PlannedSet(split, self.task, source, columns, needs, grader))
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


def gold_report(
    name: str,
    grader: str,
    rows: list[Demonstration],
    judge: Judge | None = None,
    thoughts: Sequence[Markers] = (),
) -> str:
    """One line on the gold self-test of a graded set.

    Args:
        name: What the set is called.
        grader: Name of its grader.
        rows: Its rows; of those with a demonstration that is graded, and where no row has one, what
            the references alone tell.
        judge: Asked by the graders that ask, about the first rows only.
        thoughts: Markers of the thoughts that graders are spared.

    Returns:
        The line; empty where nothing is known to be right.

    Raises:
        UserError: If the judge cannot be asked.
    """
    shown = [row for row in rows if row.demonstration]
    kind = "demonstrations"
    if shown:
        texts = [without_thoughts(demonstration_text(row), thoughts) for row in shown]
    else:
        kind = "references"
        rendered = [(row, gold_text(grader, row.reference)) for row in rows]
        shown = [row for row, text in rendered if text is not None]
        texts = [text for _, text in rendered if text is not None]
    if not shown:
        return ""
    if judge is not None and grader in JUDGED:
        count = judge.settings.gold_rows
        shown, texts = shown[:count], texts[:count]
        scores = judge.check(grader, judged_answers(texts, shown))
        failing = [i for i, score in enumerate(scores) if score < 1.0]
        found = GoldSelfTest(len(scores) - len(failing), len(scores), failing)
    else:
        found = gold_self_test(grader, [row.reference for row in shown], texts)
    line = (
        f"{name}: grader {grader}: the {kind} themselves get {found.passed} of {found.total} right"
    )
    if found.failing:
        line += f"; the first that fails is {shown[found.failing[0]].origin}"
    return line


def set_warnings(planned: PlannedSet, found: TokenizedRows, total: int, by: Tokenizer) -> list[str]:
    """One sentence for each thing that is not as a reader of the figures will think.

    Args:
        planned: Which set it is, and how it is graded.
        found: Its rows as tokens.
        total: How many rows its file has.
        by: What tokenized them.
    """
    name, told = f"data.{planned.key}", []
    if planned.grader is not None and found.skipped:
        told.append(
            f"{name}: {found.skipped} of {total} rows are too long and left out: accuracies are of "
            f"the other {len(found.rows)}. Raise data.lengths to have all."
        )
    rows = stored(found.rows).demonstrations
    shown = [row for row in rows if row.demonstration]
    if planned.grader is not None and 0 < len(shown) < len(rows):
        told.append(
            f"{name}: {len(rows) - len(shown)} of {len(rows)} rows have no demonstration: the "
            f"teacher's accuracy is of the other {len(shown)}, the student's of all."
        )
    stops = [str(by.tokenizer.decode([stop])) for stop in by.stop_ids]
    ended = [row for row in shown if any(stop in demonstration_text(row) for stop in stops)]
    if planned.key != "train" or by.style.control_tokens == "escape":
        ended = []
    if ended:
        told.append(
            f"{ended[0].origin}: the demonstration has a token in its text that ends an answer "
            f"({' or '.join(stops)}), as {len(ended)} of {len(rows)} rows have: SFT learns it up "
            "to there only. Take it out of the text."
        )
    known = {id(row) for row in ended}
    told += _control_tokens(name, [row for row in rows if id(row) not in known], by)
    return told


def _control_tokens(name: str, rows: list[Demonstration], by: Tokenizer) -> list[str]:
    if by.style.control_tokens == "refuse":
        return []  # no such row is left
    control = ControlTokens(by.tokenizer, by.stop_ids)
    found = [(row, tokens) for row in rows if (tokens := control.found(row))]
    if not found:
        return []
    tokens = list(dict.fromkeys(token for _, each in found for token in each))
    done = "The model reads them as its own: such a text can end a turn or begin another's. Set "
    if by.style.control_tokens == "escape":
        done = "They are escaped: a blank stands behind the first character of each. Else set "
    return [
        f"{name}: {len(found)} of {len(rows)} rows have control tokens of the model in their text "
        f"({', '.join(tokens[:5])}), the first is {found[0][0].origin}. {done}"
        "data.prompts.control_tokens: refuse"
        + (" or escape." if by.style.control_tokens == "tell" else ".")
    ]
