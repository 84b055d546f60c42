"""What is told of a set that is not as it seems: rows left out, not taught, or cut short."""

from __future__ import annotations

from sdft_lightning.data.control_tokens import ControlTokens
from sdft_lightning.data.planned import PlannedSet
from sdft_lightning.data.prompts import demonstration_text
from sdft_lightning.data.token_store import stored
from sdft_lightning.data.tokenize import TokenizedRows, Tokenizer
from sdft_lightning.types import Demonstration


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
