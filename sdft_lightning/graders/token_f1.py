"""`token_f1`: how many words a completion shares with the reference; needs no endpoint."""

from __future__ import annotations

from sdft_lightning.graders.judge.rubrics import judge_reference


def token_f1(text: str, reference: object) -> float:
    """Return the F1 of the words of `text` and the reference's, as SQuAD counts them.

    Case, punctuation and the articles a, an, the are left out (torchmetrics). It measures wording,
    not truth: a wrong answer in the reference's words scores high. For long free texts where no
    judge is to be had; of several accepted texts the nearest counts.

    Args:
        text: The completion.
        reference: A text, a list of accepted texts, or chat messages with assistant turns.

    Raises:
        UserError: The reference has another form.
    """
    from torchmetrics.functional.text import squad

    accepted = [judge_reference(reference)]
    if isinstance(reference, list | tuple) and all(isinstance(item, str) for item in reference):
        accepted = [str(item) for item in reference]
    found = squad(
        [{"prediction_text": text, "id": "0"}],
        [{"answers": {"answer_start": [0] * len(accepted), "text": accepted}, "id": "0"}],
    )
    return float(found["f1"]) / 100
